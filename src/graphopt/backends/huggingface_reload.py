"""Run by itself in a process of its own: load a folder with transformers alone and run it once.

Usage: python huggingface_reload.py FOLDER CLASS INPUTS OUTPUTS DTYPE, where INPUTS and OUTPUTS are
safetensors files. It imports nothing of graphopt, so that what it shows is what users of the folder will see.
"""

import sys


def main() -> None:
    """Load, run, and write the outputs."""
    folder, class_name, inputs, outputs, dtype = sys.argv[1:6]
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    transformers.logging.set_verbosity_error()
    model_class = getattr(transformers, class_name)
    model, info = model_class.from_pretrained(
        folder, dtype=getattr(torch, dtype), local_files_only=True, output_loading_info=True
    )
    missing = list(info["missing_keys"])
    if missing:
        raise SystemExit(f"transformers finds no tensor for {', '.join(sorted(missing)[:5])}")
    if info.get("mismatched_keys"):
        raise SystemExit(f"transformers finds tensors of other shapes: {list(info['mismatched_keys'])[:3]}")
    model.eval()
    model.config.use_cache = False
    with torch.no_grad():
        result = model(**load_file(inputs))
    found = {k: v.contiguous().clone() for k, v in result.items() if isinstance(v, torch.Tensor)}
    save_file(found, outputs)


if __name__ == "__main__":
    main()
