"""How much the tests do: GRAPHOPT_THOROUGH=1 draws four times as many examples and runs every case."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

THOROUGH = bool(os.environ.get("GRAPHOPT_THOROUGH"))


def examples(count: int) -> int:
    """Return how many examples a test draws that costs much."""
    return count if THOROUGH else max(4, count // 4)


def cases(first: Sequence[str], others: Sequence[str]) -> list[str]:
    """Return the cases of a test that costs much: ``others`` are of the kinds that ``first`` has."""
    return [*first, *(others if THOROUGH else ())]


# one of each kind: the others differ from these in what a configuration says, not in what a graph holds
_ARCHITECTURES = (
    "^(llama|qwen3|gemma3|phi3|gpt2|gpt_neox|gptj|gpt_bigcode|falcon|bloom|mpt|opt|cohere|nemotron|"
    "mixtral|qwen2_moe|phimoe|gpt_oss|deepseek_v3|bert|albert|deberta_v2|modernbert|"
    "t5|bart|vit|swin|convnext|resnet|mobilenet_v2)$"
)
# with those that a graph spells in a way of its own
_SPELLINGS = _ARCHITECTURES.replace("^(", "^(codegen|electra|glm|helium|mpnet|stablelm|")
# tests that cost much, and the cases of each that run anyway: one of each kind, as patterns of ids
EVERYWHERE: dict[str, tuple[str, ...]] = {
    "test_architectures.py::test_attention_is_raised_whatever_its_spelling": (_SPELLINGS,),
    "test_architectures.py::test_blocks_are_found_and_rightly_named": (_SPELLINGS,),
    "test_architectures.py::test_exact_passes_are_exact": (_SPELLINGS,),
    "test_architectures.py::test_only_functional_operators_are_left": (_SPELLINGS,),
    "test_architectures.py::test_saved_and_loaded_is_equal": (_SPELLINGS,),
    "test_architectures.py::test_shards_over_ranks": (_ARCHITECTURES[:-1] + "-2$", "^(llama|falcon|gpt_oss|t5)-4$"),
    "test_cache_sizes.py::test_the_window_that_a_configuration_has_by_default": ("^Gemma2$", "^Mistral$"),
    "test_cache_sizes.py::test_many_layers_are_checked_by_one_of_each_kind": ("2",),
    "test_compiled_decoding.py::test_compiled_pieces_write_the_same": (),
    "test_distributed.py::test_commands_under_torchrun": (),
    "test_distributed.py::test_bytes_are_those_of_the_formula": ("gather over 2",),
    "test_distributed.py::test_two_processes_compute_what_the_model_does": ("llama_tied", "gpt_oss"),
    "test_expand_branches.py::test_expanded_trained_fused": (),
    "test_formats.py::test_a_layer_skipped_written_and_read_again": (
        "^gptq-old$", "^pack-4-asymmetric$", "^fp8-power-scales$", "^nf4-double$",
    ),
    "test_few_bit_steps.py::test_logits_are_those_of_the_values": (
        "^False-bits=4 group=32$", "^False-bits=8 group=32 symmetric=false$", "^False-bits=4 group=16$",
        "^True-bits=4 group=32 head=4$", "^True-bits=8 group=0 head=8$", "^True-bits=4 group=32 symmetric=false head=8$",
    ),
    "test_fuse_branches.py::test_networks_of_the_papers": ("^True-", "^False-repvgg$"),
    # minutes of a whole model; the small ones go the same way
    "test_gguf_exit.py::test_the_real_model_shorter": (),
    "test_gguf_exit.py::test_files_are_those_that_the_conventions_ask_for": ("llama_biases", "phi3"),
    "test_graphs.py::test_onnxruntime_genai_generates_what_the_program_does": ("gpt2", "mistral"),
    "test_huggingface_exit.py::test_a_layer_fewer_loads_elsewhere_and_agrees": ("llama", "gemma3", "olmoe", "t5"),
    "test_huggingface_exit.py::test_both_ways_of_reloading_say_the_same": (),
    "test_kv_cache.py::test_text_is_that_of_transformers": (
        "^(llama|gpt2|gemma3|bloom|falcon_alibi|gpt_oss|deepseek_v3|mixtral|phi3|olmo2|persimmon|gpt_bigcode|mpt)$",
    ),
    "test_kv_cache.py::test_layers_skipped_while_decoding_alone": (r"\[0 3\]",),
    "test_mixtures.py::test_each_form_of_the_operator_is_one_function": ("silu", "swiglu"),
    "test_mixtures.py::test_fewer_experts_and_back_to_a_folder": ("scored_inputs", "one_group"),
    "test_mixtures.py::test_one_operator_and_a_dial": ("scored_inputs", "shared_scores", "sorted_tokens"),
    "test_named_kernels.py::test_captured_for_any_length": ("^(mamba|mamba2|falcon_h1|lfm2|qwen3_next)$",),
    "test_no_trace.py::test_planning_and_refusing": ("^(llama|gpt_neox|mixtral|gemma3|bert|convnext)$",),
    "test_other_kinds.py::test_a_folder_is_captured_without_inputs": (
        "^(llava|qwen2_vl|wav2vec2|whisper|deberta|sam)$",
    ),
    "test_passes.py::test_models_of_the_zoo_through_all_exact_passes": ("gemma2", "falcon", "bert"),
    "test_places.py::test_run_takes_a_text_a_row": ("llama",),
    "test_prepared_steps.py::test_logits_and_caches_are_those_of_operators": (
        "^(llama|gpt2|gptj|gemma3|bloom|falcon_alibi|mixtral|gpt_oss|deepseek_v3)$",
    ),
    "test_prune_experts.py::test_gone_is_never_chosen": ("mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3"),
    "test_quantize_cache.py::test_results_are_those_of_the_closed_form": (
        "^llama-", "^gpt2-8-4$", "^gemma2-4-0$", "^mixtral-4-4$",
    ),
    # a run of make real has these and more
    "test_real_model.py::test_every_pass_is_taken_or_refused_with_a_reason": (
        "^fuse-projections$", "^fold-norms$", "^quantize-weights{head", "^insert-cache", "^skip-layers", "^prune-ffn",
        "^attach-draft, trim", "^take-top-k", "^prune-experts",
    ),
    # the operators alone have every form
    "test_states.py::test_operators": ("False-True-False", "True-False-False", "True-True-True"),
    "test_states.py::test_text_is_that_of_transformers": ("^mamba2-$", "^lfm2-"),
    "test_states.py::test_without_a_cache": ("^falcon_h1$",),
    # what they read does not change with the library, or takes most of a minute to make
    "test_reference_models.py::test_the_text_is_made_again_byte_for_byte": (),
    "test_reference_models.py::test_no_split_shares_a_paragraph_or_a_file_with_another": (),
    "test_reference_models.py::test_perplexities_are_the_stated_ones": (),
    "test_reference_models.py::test_the_whole_way_on_the_command_line": (),
    "test_reference_models.py::test_a_run_of_a_script_goes_on": (),
    "test_reference_models.py::test_half_precision_as_stored_costs_nothing_to_speak_of": (),
    "test_reference_models.py::test_the_llama_writes_text": (),
    "test_reference_models.py::test_the_detector_is_as_good_as_stated_and_goes_everywhere": (),
    "test_reference_models.py::test_transformers_and_graphopt_agree": ("draft",),
    "test_skip_layers.py::test_what_is_left_is_the_model_built_without_it": ("attention", "ffn", "^(sandwich|parallel)-layer"),
    "test_split_ffn.py::test_every_dense_architecture_is_exact_at_the_whole": (
        "^(llama|gpt2|bert|gemma2|t5|falcon|deepseek_v3|swin|phi3)$",
    ),
    "test_stamping.py::test_folders_bind_the_same_tensors": ("^llama_tied$", "^qwen3_moe$"),
    "test_stamping.py::test_stamped_and_full_are_one_graph": ("^(llama_tied|gemma3|mixtral|t5|vit)$",),
    "test_triton.py::test_kernels_compile_for_gpus_that_are_not_here": ("dtype3",),
    "test_triton.py::test_a_package_for_this_machine_computes_what_the_program_does": (),
    "test_width.py::test_narrow_folders_load_elsewhere": ("llama", "gpt2"),
}  # fmt: skip


# files that take longest, about in that order; what uses programs of the zoo comes when the first has captured them
LONGEST = (
    "test_architectures.py test_fuse_branches.py test_onnx.py test_docs.py test_other_kinds.py test_stamping.py "
    "test_kv_cache.py test_sync_points.py test_split_ffn.py test_huggingface_exit.py test_passes.py test_cached.py "
    "test_triton.py test_real_model.py"
).split()


def place(node: str) -> int:
    """Return where a test comes, by its name as pytest prints it: tests of one file come together."""
    file = _file_and_rest(node).partition("::")[0]
    return LONGEST.index(file) if file in LONGEST else len(LONGEST)


def split(nodes: Sequence[str]) -> tuple[list[bool], list[str]]:
    """Tell of each test, by its name as pytest prints it, whether it runs everywhere; name entries that no test has."""
    unused = {(name, pattern) for name, patterns in EVERYWHERE.items() for pattern in (*patterns, "")}
    runs = []
    for node in nodes:
        name, _, case = _file_and_rest(node).partition("[")
        patterns = EVERYWHERE.get(name)
        found = [pattern for pattern in patterns or () if re.search(pattern, case.removesuffix("]"))]
        unused -= {(name, pattern) for pattern in (*found, "")}
        runs.append(patterns is None or bool(found))
    files = {_file_and_rest(node).partition("::")[0] for node in nodes}
    return runs, sorted(f"{n} {p}".strip() for n, p in unused if n.partition("::")[0] in files)


def _file_and_rest(node: str) -> str:
    """Return a test's name without the folders of its file; no two files have one name."""
    path, _, rest = node.partition("::")
    return f"{path.rpartition('/')[2]}::{rest}"
