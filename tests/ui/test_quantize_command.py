"""`pitlane quantize`: what it writes and prints, errors in one line, a process that is killed and goes on."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from pitlane.ui.cli import main

PITLANE = [sys.executable, "-c", "from pitlane.ui.cli import main; main(prog_name='pitlane')"]


def invoke(*args: str) -> Result:
    return CliRunner().invoke(main, ["quantize", *args, "--threads", str(torch.get_num_threads())])


def test_it_prints_the_way_to_try_it(tmp_path: Path) -> None:
    result = invoke("random:tiny", "--out", str(tmp_path / "out"), "--group-size", "64")
    assert result.exit_code == 0, result.output
    assert f"pitlane chat --model {tmp_path / 'out'}" in result.stdout
    assert "14 linears in" in result.stderr and "in place of" in result.stderr
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert config["config_groups"]["group_0"]["weights"]["group_size"] == 64


def test_json_has_the_settings_and_the_bytes(tmp_path: Path) -> None:
    result = invoke("random:tiny", "--out", str(tmp_path / "out"), "--bits", "8", "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["settings"] == {
        "method": "rtn", "bits": 8, "group_size": 0, "symmetric": True, "format": "compressed-tensors"
    }  # fmt: skip
    shards = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert document["linears"] == 14 and 0 < shards - document["num_bytes"] < 20_000
    assert document["num_bytes"] < document["dense_bytes"]


@pytest.mark.parametrize(
    ("args", "settings"),
    [
        (["fp8", "--granularity", "block"], {"bits": 8, "group_size": 0, "granularity": "block"}),
        (["smoothquant"], {"bits": 8, "group_size": 0}),
        (["mixed", "--bits", "4.5"], {"budget": 4.5}),
    ],
)
def test_methods_of_the_command(args: list[str], settings: dict[str, object], tmp_path: Path) -> None:
    result = invoke("random:tiny", "--out", str(tmp_path / "out"), "--json", "--method", *args)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["settings"].items() >= settings.items() and document["linears"] == 14
    assert document["num_bytes"] < document["dense_bytes"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    groups = [group["weights"]["num_bits"] for group in config["config_groups"].values()]
    assert groups == [8] if args[0] != "mixed" else set(groups) <= {4, 8}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["random:tiny", "--group-size", "48"], "--group-size must divide the inputs of every linear, got 48 and 128"),
        (["random:tiny", "--format", "awq", "--bits", "3"], "awq holds 4 bits, got 3"),
        (["random:tiny", "--format", "gguf"], "random:tiny has no tokenizer, which gguf needs"),
        (["random:tiny", "--method", "awq", "--bits", "8"], "awq needs groups of 32, 64 or 128, got 0"),
        (["random:tiny", "--bits", "4.5"], "--bits must be a whole number with rtn, got 4.5; --method mixed takes 4.5"),
        (["random:tiny", "--method", "mixed", "--group-size", "64"], "mixed chooses the groups of every linear"),
        (["random:tiny", "--granularity", "block"], "--granularity is for --method fp8, and rtn has none"),
        (["random:tiny", "--method", "fp8", "--bits", "4"], "fp8 has 8 bits, got 4; leave --bits out"),
        (["random:tiny", "--method", "mixed", "--bits", "2"], "mixed.bits"),
        (["no-such-folder/"], "is no folder and no Hugging Face id"),
        (["random:tiny", "--resume"], "nothing to resume"),
    ],
)
def test_errors_are_one_line(args: list[str], words: str, tmp_path: Path) -> None:
    result = invoke(*args, "--out", str(tmp_path / "out"))
    assert result.exit_code == 2 and result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and words in lines[0], result.stderr


@pytest.mark.slow
def test_a_killed_process_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    """SIGKILL after the first shard of `random:smollm2-135m`; then --resume."""
    args = ["quantize", "random:smollm2-135m", "--group-size", "32", "--threads", "1"]
    subprocess.run([*PITLANE, *args, "--out", str(tmp_path / "whole")], check=True, capture_output=True)
    killed = subprocess.Popen([*PITLANE, *args, "--out", str(tmp_path / "killed")], stderr=subprocess.PIPE, text=True)
    assert killed.stderr is not None
    for line in killed.stderr:
        if line.startswith("28 of 210"):
            killed.send_signal(signal.SIGKILL)
            break
    assert killed.wait() == -signal.SIGKILL
    killed.stderr.close()
    assert not (tmp_path / "killed" / "config.json").exists()
    subprocess.run([*PITLANE, *args, "--out", str(tmp_path / "killed"), "--resume"], check=True, capture_output=True)
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    kept = [path.name for path in (tmp_path / "killed").iterdir() if not path.name.endswith(".part")]
    assert sorted(kept) == names
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name


@pytest.mark.slow
def test_a_billion_parameters_in_two_gigabytes(tmp_path: Path) -> None:
    """`random:llama-1b` has 2.2 GB in bfloat16. A run, a killed run and its end stay below 2 GB, and write the same bytes."""
    args = ["quantize", "random:llama-1b", "--threads", "1"]

    def run(out: str, *more: str, kill_at: str = "") -> tuple[int, str]:
        process = subprocess.Popen(
            [*PITLANE, *args, "--out", str(tmp_path / out), *more], stderr=subprocess.PIPE, text=True
        )
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if kill_at and line.startswith(kill_at):
                process.send_signal(signal.SIGKILL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        process.stderr.close()
        assert process.returncode == (-signal.SIGKILL if kill_at else 0), lines[-3:]
        assert 10**8 < usage.ru_maxrss * 1024 < 2 * 10**9
        return usage.ru_maxrss * 1024, lines[-1]

    peak, last = run("whole")
    killed, _ = run("killed", kill_at="49 of 112")
    resumed, _ = run("killed", "--resume")
    print(f"peak {peak / 1e9:.2f} GB, killed {killed / 1e9:.2f} GB, resumed {resumed / 1e9:.2f} GB; {last.strip()}")
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert sorted(path.name for path in (tmp_path / "killed").iterdir() if path.suffix != ".part") == names
    for name in names:
        with open(tmp_path / "whole" / name, "rb") as one, open(tmp_path / "killed" / name, "rb") as other:
            assert hashlib.file_digest(one, "sha256").digest() == hashlib.file_digest(other, "sha256").digest(), name
