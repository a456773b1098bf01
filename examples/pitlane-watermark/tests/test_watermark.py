import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pitlane_watermark import Watermark, WatermarkOptions, detect, detect_text, is_green, main

from pitlane import BadOption, Engine, PluginRegistry, SamplingParams
from pitlane.testing import check_plugin

STRONG = {"delta": 4.0, "key": "a secret"}


@pytest.fixture(scope="module")
def engine():
    registry = PluginRegistry.load()
    if "watermark" not in registry.entries:  # it is there if the package is installed
        registry.add(Watermark)
    with Engine("random:tiny", dtype="float64", plugins={}, registry=registry) as engine:
        yield engine


def answer(engine, settings, *, seed=1, tokens=120, **sampling):
    params = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=1.0, seed=seed, **sampling)
    return engine.generate("A story.", params, plan=engine.plan(settings))


def options(**values):
    return WatermarkOptions(**values)


@pytest.mark.parametrize("gamma", [0.1, 0.25, 0.5])
def test_a_share_gamma_of_all_pairs_is_green(gamma):
    before, tokens = np.divmod(np.arange(400 * 400), 400)
    green = is_green(before, tokens, options(gamma=gamma)).reshape(400, 400)
    for axis in (0, 1):  # after every token, and for every token
        shares = green.mean(axis)
        deviation = (gamma * (1 - gamma) / 400) ** 0.5
        assert abs(shares.mean() - gamma) < 0.005 and abs(shares.std() / deviation - 1) < 0.2
    other = is_green(before, tokens, options(gamma=gamma, key="another")).reshape(400, 400)
    assert abs((green & other).mean() - gamma**2) < 0.005


def test_a_watermarked_answer_is_detected_and_others_are_not(engine):
    marked, plain = (answer(engine, settings).token_ids for settings in ({"watermark": STRONG}, {}))
    assert detect(marked, options(key="a secret")).z > 10
    assert abs(detect(plain, options(key="a secret")).z) < 4
    assert abs(detect(marked, options(key="another")).z) < 4
    assert detect(marked[40:100], options(key="a secret")).is_watermarked, "a part is enough"


def test_repeated_pairs_count_once():
    assert detect([1, 2] * 50).num_scored == 2 and detect([7]).z == detect([]).z == 0


def test_it_keeps_its_promise():
    """The kit runs every clause of the contract, with every built-in drafter beside the plugin."""
    check_plugin(Watermark).assert_proved()


@pytest.mark.parametrize("drafter", [{"prompt_lookup": {"num_candidates": 3, "min_ngram": 1}}, {"jacobi": {}}])
def test_a_drafter_changes_no_token(engine, drafter):
    plain, drafted = (answer(engine, {"watermark": STRONG, **plugins}) for plugins in ({}, drafter))
    assert drafted.token_ids == plain.token_ids and drafted.stats["draft_tokens"] > 0


def test_green_tokens_gain_delta_and_the_end_of_a_text_never_does():
    plugin = Watermark(options(gamma=0.5, delta=3.0))
    seqs = [SimpleNamespace(request=SimpleNamespace(stop_token_ids=frozenset(stops))) for stops in ({5, 6}, ())]
    rows = SimpleNamespace(logits=torch.zeros(3, 50), seqs=seqs, seq_index=[0, 0, 1], token_ids=[7, 8, 7])
    changed = plugin.adjust_logits(rows)
    green = torch.from_numpy(is_green(np.full(50, 7), np.arange(50), plugin.options))
    assert torch.equal(changed[2], 3.0 * green) and 10 < green.sum() < 40
    green[[5, 6]] = False
    assert torch.equal(changed[0], 3.0 * green) and not torch.equal(changed[1], changed[0])
    assert not rows.logits.any(), "the logits of the step are not written"


def test_options_are_checked(engine):
    with pytest.raises(BadOption, match=r"watermark.gamma = 0: "):
        engine.plan({"watermark": {"gamma": 0}})


@pytest.fixture(scope="module")
def texts():
    """Two texts of the bundled model: with the watermark, and without."""
    registry = PluginRegistry.load()
    if "watermark" not in registry.entries:  # it is there if the package is installed
        registry.add(Watermark)
    with Engine("bundled", dtype="float32", plugins={}, registry=registry) as engine:
        return [answer(engine, settings, tokens=250).text for settings in ({"watermark": STRONG}, {})]


def test_a_text_is_detected_as_a_whole_and_after_a_cut(texts):
    marked, plain = texts
    cut = marked[len(marked) // 4 : -len(marked) // 4]
    pasted = plain[:100] + marked[len(marked) // 3 :] + plain[-100:]
    for text in (marked, cut, pasted):
        assert detect_text(text, "bundled", options(key="a secret")).is_watermarked, text
    for text in (plain, plain[50:-50]):
        assert abs(detect_text(text, "bundled", options(key="a secret")).z) < 4, text


def test_the_command_reads_a_file_or_standard_input(texts, tmp_path, monkeypatch, capsys):
    (tmp_path / "story.txt").write_text(texts[0], encoding="utf-8")
    file = str(tmp_path / "story.txt")
    assert main([file, "--key", "a secret"]) == 0 and "has the watermark" in capsys.readouterr().out
    assert main([file, "--key", "another"]) == 1 and "shows no watermark" in capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO(texts[0]))
    assert main(["-", "--key", "a secret", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["is_watermarked"] is True
    for arguments, reason in ((["absent.txt"], "absent.txt"), ([file, "--gamma", "2"], "watermark.gamma = 2.0")):
        assert main(arguments) == 2 and reason in capsys.readouterr().err
