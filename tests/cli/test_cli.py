"""The command line as scripts see it: one JSON document, the exit status of the design, nothing left by failures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import typer
import yaml
from forging import everything_in
from paths import ROOT

import graphopt
from graphopt.cli import catalogue
from graphopt.cli.app import app
from graphopt.cli.running import run

SOURCE = ROOT / "src"


@pytest.fixture(scope="module")
def fused(saved: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("made") / "fused"
    graphopt.optimize(saved("llama"), "fuse-projections").save(place)
    return place


@pytest.fixture(scope="module")
def shorter(saved: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("made") / "shorter"
    graphopt.optimize(saved("llama"), "skip-layers{layers=[1]}").save(place)
    return place


# -- without torch ----------------------------------------------------------------------------------------


def python(code: str, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "PYTHONWARNINGS": "ignore", **more}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, check=False
    )


LIGHT = [
    ["--help"], [], ["nonsense"], ["inspect"], ["plan", "x"], ["inspect", "x", "--batch", "0"], ["passes"],
    ["passes", "fold-norms"], ["passes", "2404.06954", "--json"], ["recipes"], ["recipes", "dynamoe"], ["devices"],
    ["devices", "--json"], ["links"],
    *([command, "--help"] for command in typer.main.get_command(app).commands),
]  # fmt: skip
# what all commands import is imported once, and a process forked for each
ONE_BY_ONE = """
import json, os, pathlib, sys, traceback
sys.modules["click"] = None  # some versions of typer bring their own
from graphopt.cli import catalogue, main
built, lines, place = sys.argv[1:]
catalogue.BUILT = pathlib.Path(built)
found = []
for number, arguments in enumerate(json.loads(lines)):
    paths = [pathlib.Path(place) / f"{number}.{stream}" for stream in ("out", "err")]
    child = os.fork()
    if not child:
        for descriptor, path in enumerate(paths, 1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
        sys.argv = ["graphopt", *arguments]
        status = 1
        try:
            try:
                main()
            except SystemExit as stop:
                status = stop.code or 0
            except BaseException:
                traceback.print_exc()
            heavy = {"torch", "transformers", "numpy", "sympy", "onnx"} & set(sys.modules)
            if heavy:
                status = 99
                sys.stderr.write(f"imported {heavy}")
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    found.append([status, *(path.read_text() for path in paths)])
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def light(
    built: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, ...], subprocess.CompletedProcess[str]]:
    """What each command that is to answer at once ended with and said, by its arguments."""
    place = str(tmp_path_factory.mktemp("light"))
    done = python(ONE_BY_ONE, str(built), json.dumps(LIGHT), place)
    assert done.returncode == 0, done.stderr
    return {
        tuple(arguments): subprocess.CompletedProcess(arguments, *said)
        for arguments, said in zip(LIGHT, json.loads(done.stdout), strict=True)
    }


@pytest.mark.parametrize("arguments", LIGHT, ids=" ".join)
def test_help_lists_and_wrong_usage_answer_before_torch_is_imported(
    arguments: list[str], light: dict[tuple[str, ...], subprocess.CompletedProcess[str]]
) -> None:
    done = light[tuple(arguments)]
    listing = "--help" in arguments or (
        arguments and arguments[0] in ("passes", "recipes", "devices", "links")
    )
    expected = 0 if listing else 2
    assert done.returncode == expected, done.stderr
    assert "Traceback" not in done.stderr
    if expected == 0:
        assert ("Usage: graphopt" if "--help" in arguments else "") in done.stdout
        assert done.stdout
    elif arguments:
        assert "UsageError" in done.stderr
        assert done.stdout == "", "a usage error belongs on standard error"


def test_the_package_itself_imports_no_torch() -> None:
    done = python("import sys, graphopt; sys.exit('torch' in sys.modules)")
    assert done.returncode == 0, "import graphopt takes seconds"


def test_a_catalogue_that_was_not_built_is_kept_for_the_next_command(tmp_path: Path) -> None:
    code = f"""
import pathlib, sys
sys.argv = ["graphopt", "passes", "--json"]
from graphopt.cli import catalogue, main
catalogue.BUILT = pathlib.Path({str(tmp_path / "no.json")!r})
try:
    main()
finally:
    sys.stderr.write(f"torch: {{'torch' in sys.modules}}")
"""
    first, second = (python(code, GRAPHOPT_CACHE=str(tmp_path / "cache")) for _ in range(2))
    assert first.stderr == "torch: True", "nothing is asked although nothing was built"
    assert second.stderr == "torch: False"
    assert first.stdout == second.stdout
    assert "fold-norms" in first.stdout
    (entry,) = (p for p in (tmp_path / "cache").rglob("*") if p.is_file())
    entry.write_bytes(b"damaged")
    third = python(code, GRAPHOPT_CACHE=str(tmp_path / "cache"))
    assert (third.stderr, third.stdout) == ("torch: True", first.stdout)


def test_inspect_says_what_it_does_before_torch_is_imported() -> None:
    code = """
import sys
sys.argv = ["graphopt", "inspect", "no/such/folder"]
class Watching:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            sys.stderr.write("torch is imported\\n")
sys.meta_path.insert(0, Watching())
from graphopt.cli import main
main()
"""
    done = python(code)
    assert done.returncode == 3
    steps = done.stderr.splitlines()
    assert steps[:3] == ["loading torch ...", "torch is imported", "reading and capturing no/such/folder ..."]
    assert done.stdout == ""


def test_inspect_shows_its_steps(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(whole)]) == 0
    steps = [line for line in capsys.readouterr().err.splitlines() if line.endswith(" ...")]
    assert steps == [
        "loading torch ...",
        f"reading and capturing {whole} ...",
        "blocks and cost ...",
        "what each pass could do ...",
    ]


def test_imports_of_commands_collect_no_garbage_and_others_do() -> None:
    code = """
import gc, sys
from graphopt.cli import options
seen = []
sys.modules.pop("colorsys", None)
with options._imports("colorsys"):
    seen.append(gc.isenabled())
    import colorsys
with options._imports("colorsys"):
    seen.append(gc.isenabled())
print(seen, gc.isenabled(), gc.get_freeze_count() > 0)
"""
    assert python(code).stdout == "[False, True] True True\n"


def test_the_program_on_the_command_line_is_the_same(whole: Path) -> None:
    command = [sys.executable, "-m", "graphopt", "diff", str(whole), str(whole)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(SOURCE)}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "the graphs are the same\n"


# -- what commands say ------------------------------------------------------------------------------------


def test_inspect_names_blocks_cost_and_passes(whole: Path, told: Callable[..., Any], capsys: Any) -> None:
    found = told("inspect", whole, "--device", "h200", "--batch", 2, "--sequence", 16)
    assert [b["kind"] for b in found["blocks"]] == ["attention", "ffn"] * 2
    assert found["inputs"]["input_ids"] == ["int64", "batch", "sequence"]
    assert all(b["evidence"] for b in found["blocks"]), "a block is named without evidence"
    assert found["cost"]["time_seconds"] > 0
    small = told("inspect", whole, "--batch", 1, "--sequence", 16)
    assert found["cost"]["flops"] == 2 * small["cost"]["flops"], "--batch has no effect"
    assert {p["pass"]: p["could_take"] for p in found["passes"]}["fuse-projections"] == "4 sites"
    assert run(["inspect", str(whole)]) == 0
    assert "attention.0 ... attention.1 (2)" in capsys.readouterr().out


def test_plan_lists_every_site_and_says_why(
    whole: Path, told: Callable[..., Any], tmp_path: Path, capsys: Any
) -> None:
    steps = told(
        "plan", whole, "-p", "fuse-projections{layout=grouped}, split-projections", "-o", tmp_path / "p.yaml"
    )
    assert [s["pass"] for s in steps] == ["fuse-projections{layout=grouped}", "split-projections"]
    assert [s["block"] for s in steps[0]["sites"]] == ["attention.0", "attention.1"]
    assert {r["block"] for r in steps[0]["refused"]} == {"ffn.0", "ffn.1"}
    assert steps[1]["sites"], "the second pass is planned as if the first had not been done"
    assert yaml.safe_load((tmp_path / "p.yaml").read_text())["passes"] == steps
    assert run(["plan", str(whole), "-p", "fuse-projections{layout=grouped}", "--why", "ffn.0"]) == 0
    assert "leaves ffn.0 alone: " in capsys.readouterr().out
    (why,) = told("plan", whole, "-p", "fuse-projections", "--why", "ffn.0")
    assert (why["taken"], why["parts"]) == (True, ["gate", "up"])
    lost = told("plan", whole, "-p", "fuse-projections", "--why", "atention.0", status=2)
    assert "it looks at attention." in lost["message"], "the nearest names are not offered"


def test_a_plan_that_matches_nothing_is_shown_and_not_written(
    whole: Path, told: Callable[..., Any], tmp_path: Path
) -> None:
    steps = told("plan", whole, "-p", "split-projections", "-o", tmp_path / "p.yaml", status=4)
    assert steps[0]["sites"] == []
    assert everything_in(tmp_path) == {}, "a failed command leaves output"
    told("plan", whole, "-p", "split-projections{allow_no_match=true}", "-o", tmp_path / "p.yaml")
    assert (tmp_path / "p.yaml").is_file()


def test_an_edited_plan_is_obeyed(whole: Path, told: Callable[..., Any], tmp_path: Path) -> None:
    told("plan", whole, "-p", "fuse-projections", "-o", tmp_path / "p.yaml")
    document = yaml.safe_load((tmp_path / "p.yaml").read_text())
    first, _, third, _ = document["passes"][0]["sites"]
    document["passes"][0]["sites"] = [first, third | {"parts": ["q", "k"]}]
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(document))
    found = told("optimize", whole, "--plan", tmp_path / "p.yaml", "-o", tmp_path / "out")
    assert found["report"]["passes"][0]["sites"] == ["attention.0", "attention.1"]
    assert found["operators"]["aten.linear"] == 15 - 2 - 1, (
        "another set of projections was fused than the plan says"
    )
    record = graphopt.load(tmp_path / "out").history[-1]
    assert record["plan"]["sites"] == document["passes"][0]["sites"]


def test_optimize_writes_reports_and_dumps(whole: Path, told: Callable[..., Any], tmp_path: Path) -> None:
    found = told("optimize", whole, "-p", "fuse-projections, split-projections", "-o", tmp_path / "out", "--verify", "full",
                 "--dump-dir", tmp_path / "dump", "--print-after-all")  # fmt: skip
    dumps = {p.name: p.read_text() for p in (tmp_path / "dump").iterdir()}
    assert set(dumps) == {"01-fuse-projections.txt", "02-split-projections.txt"}
    assert [text.count("aten.linear") for _, text in sorted(dumps.items())] == [9, 15], (
        "a dump shows another moment"
    )
    assert "# attention.0" in dumps["01-fuse-projections.txt"]
    whole_program = [m for p in found["report"]["passes"] for m in p["metric"]]
    assert whole_program == ["whole program, logits"] * 2, "--verify full did not compare whole programs"
    assert [e["pass"] for e in graphopt.load(tmp_path / "out").history] == [
        "fuse-projections",
        "split-projections",
    ]


def test_verify_gives_numbers_and_a_verdict(
    whole: Path, fused: Path, shorter: Path, rows: Path, told: Callable[..., Any]
) -> None:
    found = told("verify", whole, fused)
    assert (found["verdict"], found["exact"]) == ("holds", True)
    assert found["errors"]["logits"] < 1e-6
    unjudged = told("verify", whole, shorter, status=4)
    assert "not judged" in unjudged["verdict"], "an approximate pass holds a contract that nobody measured"
    assert unjudged["errors"]["logits"] > 0.01
    measured = told("verify", whole, shorter, "--data", rows, status=4)
    assert set(measured["metrics"]) == {"perplexity", "perplexity before"}
    assert "no pass has a budget" in measured["verdict"], "what nobody promised is said to hold"
    assert told("verify", whole, shorter, "--data", rows, "--budget", 1000)["verdict"] == "holds"
    lost = told("verify", whole, shorter, "--data", rows, "--budget", 0, status=5)
    assert any("budget of 0" in line for line in lost["budgets"])


def test_diff_shows_the_graphs(whole: Path, fused: Path, told: Callable[..., Any]) -> None:
    found = told("diff", whole, fused)
    assert found["operators"]["aten.linear"] == [15, 9]
    assert any(line.startswith("-%") for line in found["diff"])
    assert told("diff", whole, whole)["diff"] == []


# -- leaving ----------------------------------------------------------------------------------------------


def test_a_program_leaves_and_comes_back(
    fused: Path, told: Callable[..., Any], tmp_path: Path, rows: Path
) -> None:
    found = told("export", fused, "--to", "pt2", "-o", tmp_path / "p.pt2")
    assert found["errors"]["logits"] < 1e-5
    assert "trust" in told("inspect", tmp_path / "p.pt2", status=3)["message"]
    assert told("inspect", tmp_path / "p.pt2", "--trust")["operators"]
    exact = told("export", fused, "--to", "huggingface", "-o", tmp_path / "hf")
    assert (exact["checked"], exact["errors"]["logits"] < 1e-5) == ("reload", True)
    told("run", fused, "--input", rows, "-o", tmp_path / "values.npz")
    told(
        "run",
        tmp_path / "p.pt2",
        "--trust",
        "--input",
        full_rows(rows, tmp_path),
        "-o",
        tmp_path / "again.npz",
    )
    first, second = (numpy.load(tmp_path / name)["logits"] for name in ("values.npz", "again.npz"))
    assert first.shape == (16, 8, 101)
    assert numpy.allclose(first, second, atol=1e-5), "the exported file computes something else"
    assert {p.name for p in tmp_path.iterdir()} == {"p.pt2", "hf", "values.npz", "again.npz", "full.npz"}


def full_rows(rows: Path, folder: Path) -> Path:
    """An exported file takes every input."""
    ids = numpy.load(rows)["input_ids"]
    numpy.savez(folder / "full.npz", input_ids=ids, attention_mask=numpy.ones_like(ids),
                position_ids=numpy.tile(numpy.arange(8), (16, 1)))  # fmt: skip
    return folder / "full.npz"


def test_the_catalogue_tells_where_defaults_come_from(told: Callable[..., Any], capsys: Any) -> None:
    entries = {e["name"]: e for e in told("passes")}
    assert {"fold-norms", "fuse-projections", "skip-layers", "split-projections"} <= set(entries)
    for entry in entries.values():
        assert entry["summary"]
        assert all(
            o["source"] in ("paper", "code", "recalled", "ours") and o["help"] for o in entry["options"]
        )
    assert told("passes", "2404.06954")["name"] == "skip-layers", "a pass is not found by its paper"
    assert told("passes", "insert-kv-cache")["name"] == "insert-cache", (
        "a pass is not found by its former name"
    )
    assert run(["passes", "skip-layers"]) == 0
    assert "paper: arXiv 2404.06954" in capsys.readouterr().out
    assert told("devices")["h200"]["bandwidth"] > 4e12
    assert [m["name"] for m in told("recipes", "dynamoe")] == ["dynamoe"]
    assert "did you mean dynamoe" in told("recipes", "dynamo", status=2)["message"]
    assert "did you mean fold-norms" in told("passes", "fold-norm", status=2)["message"]


def test_the_catalogue_is_what_passes_recipes_devices_and_links_say(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graphopt.cli import describing
    from graphopt.passes import BUILT_IN
    from graphopt.training.recipes import METHODS

    said = describing.everything()
    monkeypatch.setattr(describing, "everything", lambda: {"asked": True})
    monkeypatch.setattr(catalogue, "BUILT", built)
    held = catalogue.catalogue()
    assert held == said, "what was built is not what there is"
    for text in ("{}", built.read_text().replace(catalogue.sources(), "of other sources")):
        monkeypatch.setattr(catalogue, "BUILT", tmp_path / "catalogue.json")
        assert catalogue.catalogue() == {"asked": True}, "nothing is asked where nothing was built"
        catalogue.BUILT.write_text(text)
        assert catalogue.catalogue() == {"asked": True}, "a catalogue of other sources is believed"
        catalogue.BUILT.unlink()
    assert set(held["passes"]) == set(BUILT_IN)
    assert set(held["recipes"]) == set(METHODS)
