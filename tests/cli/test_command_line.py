"""The commands: what they print, what they leave, and the exit status of each kind of failure."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml
import zoo

import graphopt
from graphopt.cli.app import app
from graphopt.cli.running import run

pytestmark = pytest.mark.usefixtures("captured_once")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("llama")
    zoo.make("llama").save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def fused(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("fused") / "program"
    assert run(["optimize", str(folder), "-p", "fuse-projections", "-o", str(place)]) == 0
    return place


def printed(capsys: pytest.CaptureFixture[str], arguments: list[str], status: int = 0):
    capsys.readouterr()
    found = run([*arguments, "--json"])
    text = capsys.readouterr()
    assert found == status, text.err
    return json.loads(text.out)


def test_help_imports_no_torch() -> None:
    code = (
        "import sys; from graphopt.cli.running import run; run(['--help']); sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, "help waits seconds for torch"
    assert "inspect" in done.stdout and "lower" in done.stdout


def test_everything_that_a_command_takes_is_described() -> None:
    commands = typer.main.get_command(app).commands
    for name, command in commands.items():
        assert command.help, name
        for taken in command.params:
            assert taken.help, f"{name} does not say what {taken.name} is"
            assert not taken.secondary_opts, f"{name} takes {taken.secondary_opts} too"


def test_inspect(folder: Path, capsys) -> None:
    found = printed(capsys, ["inspect", str(folder), "--device", "h200"])
    assert [b["kind"] for b in found["blocks"]] == ["attention", "ffn"] * 2
    assert found["cost"]["time_seconds"] > 0
    assert {p["pass"] for p in found["passes"]} >= {"fuse-projections", "skip-layers"}


def test_plan_is_edited_and_obeyed(folder: Path, tmp_path: Path, capsys) -> None:
    plan = tmp_path / "plan.yaml"
    printed(capsys, ["plan", str(folder), "-p", "fuse-projections", "-o", str(plan)])
    document = yaml.safe_load(plan.read_text())
    document["passes"][0]["sites"] = [s for s in document["passes"][0]["sites"] if s["block"] == "ffn.1"]
    plan.write_text(yaml.safe_dump(document))
    report = printed(capsys, ["optimize", str(folder), "--plan", str(plan), "-o", str(tmp_path / "out")])
    assert report["report"]["passes"][0]["sites"] == ["ffn.1"], "more was done than the plan says"


def test_plan_says_why(folder: Path, capsys) -> None:
    assert run(["plan", str(folder), "-p", "fuse-projections{layout=grouped}", "--why", "ffn.0"]) == 0
    assert "no groups" in capsys.readouterr().out


def test_verify_holds_and_a_tampered_program_does_not(
    folder: Path, fused: Path, tmp_path: Path, capsys
) -> None:
    found = printed(capsys, ["verify", str(folder), str(fused)])
    assert found["verdict"] == "holds" and max(found["errors"].values()) < 1e-6
    import graphopt

    program = graphopt.load(fused)
    program.insert_after(program.anatomy.ffn[0].parts["down"], lambda x: x * 1.01)
    program.save(tmp_path / "tampered")
    assert run(["verify", str(folder), str(tmp_path / "tampered")]) == 5, (
        "a changed function passed for an exact one"
    )


def test_diff_shows_what_changed(folder: Path, fused: Path, capsys) -> None:
    found = printed(capsys, ["diff", str(folder), str(fused)])
    assert found["operators"]["aten.linear"] == [15, 9]


def test_export_lower_and_run(fused: Path, tmp_path: Path, capsys) -> None:
    assert (
        max(
            printed(capsys, ["export", str(fused), "--to", "huggingface", "-o", str(tmp_path / "hf")])[
                "errors"
            ].values()
        )
        < 1e-5
    )
    assert (
        max(
            printed(capsys, ["export", str(fused), "--to", "pt2", "-o", str(tmp_path / "p.pt2")])[
                "errors"
            ].values()
        )
        < 1e-4
    )
    printed(capsys, ["lower", str(fused), "--to", "onnx", "-o", str(tmp_path / "m.onnx")])
    assert (tmp_path / "m.onnx").is_file()
    import numpy

    numpy.savez(tmp_path / "in.npz", input_ids=numpy.arange(5, 17).reshape(2, 6))
    arguments = ["run", str(fused), "--input", str(tmp_path / "in.npz"), "-o", str(tmp_path / "out.npz")]
    assert "logits" in printed(capsys, arguments)["outputs"]
    assert numpy.load(tmp_path / "out.npz")["logits"].shape == (2, 6, 101)


def test_catalogue_and_devices(capsys) -> None:
    assert {e["name"] for e in printed(capsys, ["passes"])} >= {"fold-norms", "split-projections"}
    assert printed(capsys, ["passes", "2404.06954"])["name"] == "skip-layers"
    assert "h200" in printed(capsys, ["devices"])


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (
            ["optimize", "{folder}", "-p", "fuse-projektions", "-o", "{out}"],
            2,
            "did you mean 'fuse-projections'",
        ),
        (
            ["optimize", "{folder}", "-p", "fuse-projections{layuot=plain}", "-o", "{out}"],
            2,
            "did you mean 'layout'",
        ),
        (["optimize", "{folder}", "-o", "{out}"], 2, "-p, or a plan"),
        (["optimize", "{folder}", "--nonsense"], 2, "No such option"),
        (["inspect", "{folder}", "--device", "h2000"], 2, "h200"),
        (["inspect", "{out}"], 3, "is not a folder"),
        (["optimize", "{folder}", "-p", "split-projections", "-o", "{out}"], 4, "matched nothing"),
        (["lower", "{folder}", "--to", "onnx", "--opset", "17", "-o", "{out}"], 4, "opset 17"),
    ],
)
def test_failures_have_their_exit_status_and_leave_nothing(
    folder: Path, tmp_path: Path, capsys, arguments: list[str], status: int, says: str
) -> None:
    out = tmp_path / "out"
    filled = [a.replace("{folder}", str(folder)).replace("{out}", str(out)) for a in arguments]
    assert run(filled) == status
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir()), "a failed command left output behind"


def test_rows_beyond_the_positions_are_refused(fused: Path, tmp_path: Path, capsys) -> None:
    """Wrong if arrays were computed where the same tokens as text are refused."""
    import numpy

    limit = graphopt.load(fused).origin.config["max_position_embeddings"]
    numpy.savez(tmp_path / "in.npz", input_ids=numpy.full((1, limit + 1), 7))
    out = tmp_path / "out.npz"
    assert run(["run", str(fused), "--input", str(tmp_path / "in.npz"), "-o", str(out)]) == 2
    assert f"input_ids have {limit + 1} tokens, the program takes {limit}" in capsys.readouterr().err
    assert not out.exists()
