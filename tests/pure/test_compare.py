"""Numbers of a comparison, forced and free, and what a gate, a table and a plot make of them."""
import math
import re

import numpy as np
import pytest

from engines.alignment import NO_CAUSES, report
from engines.alignment.align import align
from engines.alignment.causes import Finding
from engines.alignment.compare import (
    FORCED,
    FREE,
    Difference,
    Parity,
    Row,
    difference,
    forced,
    free,
    judge,
    pairs,
    psnr,
)
from engines.alignment.plot import Line, Panel, draw, of_parity
from engines.alignment.recording import Recorder, Recording
from engines.errors import EngineError, NotFinite
from tests.helpers import toy_networks
from tests.helpers.toy_networks import Network, networks, run


def test_difference_by_hand():
    found = difference(np.array([3.0, 4.0]), np.array([4.0, 3.0]))
    assert found == pytest.approx(Difference(1.0, 1.0, math.sqrt(2) / 5, 24 / 25))


def test_difference_of_nothing():
    zero, one = np.zeros(4), np.ones(4)
    assert difference(zero, zero) == Difference(0, 0, 0, 1)
    assert difference(one, zero) == Difference(1, 1, math.inf, 0)
    assert difference(zero, one).relative == 1 and difference(zero, one).cosine == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_difference_of_what_is_not_finite(bad):
    assert not difference(np.array([1, bad]), np.ones(2)).finite
    assert not difference(np.ones(2), np.array([1, bad])).finite
    with pytest.raises(EngineError, match=r"an answer is \[2\] and the reference's \[3\]"):
        difference(np.ones(2), np.ones(3))


def test_psnr():
    picture = np.full((1, 8, 8, 3), 0.5)
    assert psnr(picture + 0.1, picture) == pytest.approx(20) and psnr(picture, picture) == math.inf
    with pytest.raises(EngineError, match="1x8x8x3 and its reference 1x4x4x3"):
        psnr(picture, picture[:, :4, :4])


def test_forced_runs_every_call_on_the_references_inputs(tmp_path):
    reference, seen = run(tmp_path / "a.npz"), []
    rows = list(forced(reference, networks(unet=Network(toy_networks.unet, after=lambda out: {
        "prediction": out["prediction"] + 0.01})), lambda *done: seen.append(done)))
    assert [(row.stage, row.array, row.step) for row in rows] == [
        ("text_encoder", "hidden", None), ("text_encoder", "pooled", None), ("text_encoder", "hidden", None),
        ("text_encoder", "pooled", None), *[("unet", "prediction", step) for step in range(1, 6)],
        ("vae_decoder", "image", None)]
    assert [row.number for row in rows if row.stage == "unet"] == list(range(5))
    for row in rows:
        assert row.difference.l1 == pytest.approx(0.01 if row.stage == "unet" else 0, abs=1e-7)
    assert seen == [(i, 8) for i in range(9)]


def test_forced_takes_what_a_network_has(tmp_path):
    reference = run(tmp_path / "a.npz")

    def refuses(call):
        raise NotFinite("NaN")
    rows = list(forced(reference, {"text_encoder": Network(toy_networks.text_encoder, after=lambda out: {
        "hidden": out["hidden"]}), "unet": refuses}))
    assert {(row.stage, row.array) for row in rows} == {("text_encoder", "hidden"), ("unet", "prediction")}
    assert not any(row.difference.finite for row in rows if row.stage == "unet")


def drift(stage, outputs):
    return {name: array * np.float32(1.003) if stage == "unet" else array for name, array in outputs.items()}


def test_free_follows_each_trajectory(tmp_path):
    reference, candidate = run(tmp_path / "a.npz", steps=20), run(tmp_path / "b.npz", after=drift, steps=20)
    rows = list(free(pairs(reference, candidate)))
    latents = [row.difference.relative for row in rows if row.array == "latent"]
    assert latents[0] == 0 and latents[-1] > 0.001 and len(latents) == 20
    own = [row.difference.relative for row in forced(reference, networks(unet=Network(toy_networks.unet, after=lambda out: (
        drift("unet", out))))) if row.stage == "unet"]
    assert np.allclose(own, 0.003, rtol=1e-3)
    assert {row.stage for row in rows} == {"text_encoder", "unet", "vae_decoder"}


def test_condition_and_uncondition_alone_are_joined(tmp_path):
    together, apart = run(tmp_path / "a.npz"), run(tmp_path / "b.npz", apart=True)
    assert len(apart.of("unet")) == 10
    for one, other in ((together, apart), (apart, together), (apart, apart)):
        found = [pair for pair in pairs(one, other) if pair.reference.stage == "unet"]
        assert len(found) == (10 if one is other else 5)
        assert all(row.difference.relative < 1e-6 for row in free(found))


def test_prompts_encoded_in_another_order(tmp_path):
    reference = run(tmp_path / "a.npz")
    first, second, *rest = reference.calls
    for calls in ((second, first, *rest), (first, second, *rest)):
        assert all(row.difference.l1 == 0 for row in free(pairs(reference, Recording("b", calls))))


def test_runs_of_another_kind(tmp_path):
    with pytest.raises(EngineError, match="calls the U-Net 5 times and 'b' 7 times"):
        pairs(run(tmp_path / "a.npz"), run(tmp_path / "b.npz", steps=7))


def test_runs_of_another_batch(tmp_path):
    def twice(stage, inputs):
        return {name: np.repeat(array, 2, 0) for name, array in inputs.items()}
    alone = run(tmp_path / "a.npz", steps=1)
    recorder = Recorder(tmp_path / "b.npz", "b")
    for call in alone.calls:
        recorder.add(call.stage, twice(call.stage, call.inputs), twice(call.stage, call.outputs), **call.facts)
    with pytest.raises(EngineError, match="'a' calls the text encoder with 2 rows in all and 'b' with 4 rows in all"):
        pairs(alone, recorder.recording())


def test_text_encoders_of_two_parts_are_not_mixed(tmp_path):
    """SDXL's two get the same ids where neither pads, and answer in different widths."""
    def recorded(name, parts):
        recorder = Recorder(tmp_path / f"{name}.npz", name)
        for part in parts:
            hidden = np.ones((1, 77, 3 + len(part)))
            recorder.add("text_encoder", {"ids": np.full((1, 77), 5)}, {"hidden": hidden}, part=part)
        return recorder.recording()
    matched = pairs(recorded("a", ["clip_l", "clip_big"]), recorded("b", ["clip_big", "clip_l"]))
    assert [pair.candidate.facts["part"] for pair in matched] == ["clip_l", "clip_big"]
    assert all(row.difference.relative == 0 for row in free(matched))


def test_shapes_that_differ_have_a_reason(tmp_path):
    """The cause is told rather than the shapes."""
    with pytest.raises(EngineError, match="do not belong together: the first latent is"):
        align(run(tmp_path / "a.npz"), candidate=run(tmp_path / "b.npz", width=16))
    with pytest.raises(EngineError, match="the U-Net's latent at step 1 of 5 is"):
        align(run(tmp_path / "a.npz"), candidate=run(tmp_path / "b.npz", width=16), causes=NO_CAUSES)


def test_a_full_recording_is_compared_as_far_as_it_goes(tmp_path):
    reference = run(tmp_path / "a.npz")
    cut = Recording("cut", reference.calls[:4], {}, full=True)
    assert len(pairs(reference, cut)) == len(pairs(cut, reference)) == 4


# -- judging -----------------------------------------------------------------------------------------------------------
def parity(*rows: Row, **more) -> Parity:
    return Parity("reference", "candidate", list(rows), **more)


def row(cosine: float, mode=FORCED, stage="unet", step=3) -> Row:
    return Row(mode, stage, 2, "prediction", Difference(1e-3, 1e-2, 1e-3, cosine), step, 20)


@pytest.mark.parametrize(("thresholds", "words"), [
    ({"min_cosine": 0.999}, ["U-Net, step 3 of 20, prediction, teacher-forced", "0.990000", "0.999"]),
    ({"min_cosine_free": 0.95}, ["step 7 of 20", "free-running", "0.900000"]),
    ({"min_psnr": 30}, ["PSNR of 25.0 dB", "30 dB"]),
])
def test_gate_names_stage_and_step(thresholds, words):
    found = parity(row(0.9999), row(0.99), row(0.9, FREE, step=7), psnr=25.0, findings=[Finding("cast", "unet", "Because.")])
    with pytest.raises(EngineError) as said:
        judge(found, **thresholds)
    assert all(word in str(said.value) for word in [*words, "Because."]) and "\n" not in str(said.value)
    judge(found, min_cosine=0.98, min_cosine_free=0.8, min_psnr=20)
    judge(found)


def test_gate_lets_no_nan_through():
    with pytest.raises(EngineError, match="U-Net, step 3 of 20, prediction, free-running: NaN"):
        judge(parity(Row(FREE, "unet", 2, "prediction", difference(np.array([np.nan]), np.ones(1)), 3, 20)))


def test_gate_of_nothing():
    with pytest.raises(EngineError, match="nothing to judge"):
        judge(parity(), min_cosine=0.9)


# -- text and pictures -------------------------------------------------------------------------------------------------
@pytest.fixture
def whole(tmp_path) -> Parity:
    reference, candidate = run(tmp_path / "a.npz"), run(tmp_path / "b.npz", after=drift)
    rows = [*forced(reference, networks(unet=Network(toy_networks.unet, after=lambda out: drift("unet", out)))),
            *free(pairs(reference, candidate))]
    return Parity("torch", "compiled", rows, [], ["A remark."], 41.23)


def test_text(whole):
    text = report.text(whole)
    assert re.search(r"^stage +step +array +L1 +max +relative +cosine$", text, re.M)
    assert re.search(r"^U-Net +3/5 +prediction +\d\.\d\de-0\d +\S+ +3.00e-03 +1.0000000$", text, re.M)
    for said in ("torch", "compiled", "0.30 % a call: as 16-bit floats make it", "PSNR of 41.2 dB", "A remark.",
                 "No classic cause", "at the first call", "times its own error there"):
        assert said in text
    assert all(line == line.rstrip() for line in text.splitlines())


def test_text_of_long_runs_is_cut():
    rows = [Row(FORCED, "unet", i, "prediction", Difference(0, 0, 0, 1), i + 1, 200) for i in range(200)]
    text = report.text(parity(*rows))
    assert "... 136 more" in text and "200/200" in text and len(text.splitlines()) < 80


@pytest.mark.parametrize(("relative", "said"), [(1e-6, "single precision"), (5e-3, "16-bit floats"), (0.2, "more than")])
def test_what_precision_explains(relative, said):
    assert said in report.text(parity(Row(FORCED, "unet", 0, "prediction", Difference(1, 1, relative, 1))))


@pytest.mark.parametrize(("relative", "said"), [
    (0, "0 %"), (3.1e-3, "0.31 %"), (3.14e-5, "0.0031 %"), (3.14e-9, "3.1e-07 %"), (1.4, "140.00 %")])
def test_percent(relative, said):
    assert report.percent(relative) == said


def test_json_has_no_nan(whole):
    whole.rows.append(Row(FREE, "vae_decoder", 0, "image", difference(np.array([np.nan]), np.ones(1))))
    whole.psnr = math.inf
    found = report.as_json(whole)
    assert found["psnr"] is None and found["rows"][-1]["cosine"] is None and found["rows"][0]["mode"] == "teacher-forced"


def test_description(tmp_path):
    found = report.describe(run(tmp_path / "a.npz"))
    assert "5 calls of the U-Net: latent [2, 4, 8, 8], timestep [2]" in found and "2 calls of the text encoder" in found


def test_plot(whole):
    picture = of_parity(whole)
    assert picture.mode == "RGB" and picture.size == (560, 800)
    colours = {colour for _, colour in picture.getcolors(1 << 20)}
    assert (0, 0x72, 0xb2) in colours and (0xd5, 0x5e, 0) in colours and len(colours) > 20


@pytest.mark.parametrize("rows", [[], [row(1.0)], [row(math.nan)],
                                  [Row(FORCED, "text_encoder", 0, "hidden", Difference(0, 0, 0, 1))]], ids=str)
def test_plot_of_next_to_nothing(rows):
    assert of_parity(parity(*rows)).size == (560, 800)


def test_plot_axes():
    """A taller value is higher, on both kinds of axis, and labels stay inside."""
    for logarithmic in (True, False):
        picture = np.asarray(draw([Panel("t", [Line("l", [(1, 1e-3), (2, 1e-2), (3, 1.0)])], logarithmic=logarithmic)]))
        blue = np.argwhere((np.abs(picture.astype(int) - [0, 0x72, 0xb2]).sum(2) < 10) & (np.arange(400)[:, None] < 320))
        first, last = blue[blue[:, 1].argmin()], blue[blue[:, 1].argmax()]
        assert first[0] > last[0] + 200
        assert (picture[[0, -1]] == 255).all() and (picture[:, [0, -1]] == 255).all()
