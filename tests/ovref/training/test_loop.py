"""The training loop on a small model: schedules, resuming, workers, and what stops it."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import training_fakes as fakes
from ovref.errors import ConfigError, MismatchError, ModelError, StorageError
from ovref.storage.file_store import Store
from ovref.training import checkpoints
from ovref.training.loop import train
from ovref.training.settings import ParameterGroup, TrainingConfig, rate_at
from ovref_inference.errors import MissingPackageError

CONFIG = TrainingConfig(steps=8, batch=4, rate=0.05, save_every=3, log_every=2, decay=0.1)


def trained(folder, config=CONFIG, batches=fakes.batches, losses_of=fakes.losses_of, **options):
    """The weights of a small model after training, and what the loop returns."""
    model = fakes.new_model(**options)
    store = Store.open(str(folder))
    found = train(model, losses_of, batches, config, store, identity={"data": "fake"})
    return {n: p.detach().clone() for n, p in model.named_parameters()}, found


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("undisturbed"))


def test_it_is_adamw_on_the_mean_over_all_images(undisturbed):
    """Against the update of AdamW (Loshchilov and Hutter, 2019), written out for one weight."""
    config = replace(CONFIG, steps=3)
    weights, found = trained(fakes.fresh(), config, frozen=("inner", "outer.bias"))
    model = fakes.new_model()
    weight, first, second = model.outer.weight.detach().double().clone(), 0.0, 0.0
    for step in range(3):
        batch = fakes.batches(step, 0, 1)
        hidden = torch.tanh(model.inner(batch.inputs)).detach().double()
        errors = hidden @ weight.T + model.outer.bias.detach() - batch.wanted
        gradient = (2 * errors * hidden).mean(0, keepdim=True)
        rate = 0.05 * (1 - step / 3) ** 0.9
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        weight = weight * (1 - rate * 0.1)
        unbiased = (second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
        weight = weight - rate * first / (1 - 0.9 ** (step + 1)) / unbiased
    np.testing.assert_allclose(weights["outer.weight"], weight, rtol=1e-5)
    assert torch.equal(weights["inner.weight"], model.inner.weight)  # frozen
    assert [row["step"] for row in found["history"]] == [2, 3]


def test_history_and_progress(undisturbed):
    _, found = undisturbed
    history = found["history"]
    assert [row["step"] for row in history] == [2, 4, 6, 8]
    assert set(history[0]) == {"step", "rate", "loss", "norm", "square", "size"}
    assert history[0]["rate"] == pytest.approx(0.05 * (1 - 1 / 8) ** 0.9)
    lines = []
    store = Store.open(str(fakes.fresh()))
    train(fakes.new_model(), fakes.losses_of, fakes.batches, CONFIG, store,
          identity={}, say=lines.append)  # fmt: skip
    assert lines[-1].startswith("step 8 of 8: loss ") and lines[-1].endswith("0:00:00 to go")
    assert "images/s" in lines[-1] and "square" in lines[-1]


def test_a_stopped_training_goes_on_to_the_same_weights(undisturbed, tmp_path):
    class StoppedError(Exception):
        pass

    def stopping(step, part, parts):
        if step == 5:
            raise StoppedError
        return fakes.batches(step, part, parts)

    with pytest.raises(StoppedError):
        trained(tmp_path, batches=stopping)
    assert checkpoints.steps_saved(Store.open(str(tmp_path))) == [3, 4]  # 4 is half of the steps
    weights, found = trained(tmp_path)
    assert same(weights, undisturbed[0])
    rows = [[row["step"], row["loss"]] for row in found["history"]]
    assert rows == [[row["step"], row["loss"]] for row in undisturbed[1]["history"]]
    # Once finished it is left as it is.
    again, _ = trained(tmp_path, batches=None)
    assert same(again, weights)
    assert checkpoints.steps_saved(Store.open(str(tmp_path))) == [4, 6, 8]


def test_checkpoints_lie_on_s3_too(undisturbed, s3_endpoint):
    store = Store.open("s3://bucket/training", endpoint_url=s3_endpoint, key="testing",
                       secret="testing")  # fmt: skip
    train(fakes.new_model(), fakes.losses_of, fakes.batches, CONFIG, store, identity={})
    found = checkpoints.read(store, 8)
    assert same(found.weights, undisturbed[0]) and found.step == 8


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulated_parts_give_the_step_of_the_whole(undisturbed, tmp_path, accumulate):
    weights, _ = trained(tmp_path, replace(CONFIG, accumulate=accumulate))
    for name, value in weights.items():
        np.testing.assert_allclose(value, undisturbed[0][name], rtol=1e-4, atol=1e-6)
    # And an unfinished training may change it.
    assert checkpoints.read(Store.open(str(tmp_path)), 8).step == 8


def test_what_is_dropped_at_random_is_the_same_after_a_stop(tmp_path):
    whole, _ = trained(tmp_path / "a", dropout=0.5)
    other, _ = trained(tmp_path / "b", replace(CONFIG, seed=1), dropout=0.5)
    assert not same(whole, other)

    def cut(step, part, parts):
        if step == 4:
            raise KeyboardInterrupt
        return fakes.batches(step, part, parts)

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "c", batches=cut, dropout=0.5)
    assert same(trained(tmp_path / "c", dropout=0.5)[0], whole)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_ends_it_and_keeps_the_last_checkpoint(tmp_path, bad):
    def spoilt(model, batch):
        found = fakes.losses_of(model, batch)
        return found | {"square": found["square"] * bad} if "image 20" in batch.names else found

    with pytest.raises(ModelError) as raised:
        trained(tmp_path, losses_of=spoilt)
    message = str(raised.value)
    assert "not finite at step 6 " in message and "image 20, image 21" in message
    assert "the checkpoint of step 4 is kept" in message
    kept = checkpoints.read(Store.open(str(tmp_path)), 4)
    assert all(value.isfinite().all() for value in kept.weights.values())


def test_gradients_that_are_not_finite_end_it_too(tmp_path):
    def rooted(model, batch):  # the root of zero has an infinite slope
        return {"root": (model(batch.inputs) * 0).sum(1).sqrt()}

    with pytest.raises(ModelError, match=r"at step 1 \(root 0; norm of the gradients nan\)"):
        trained(tmp_path, losses_of=rooted)


def test_other_settings_are_refused_and_a_damaged_checkpoint_is_told(tmp_path):
    trained(tmp_path)
    with pytest.raises(MismatchError, match=r"training.rate was 0.05 and is now 0.04"):
        trained(tmp_path, replace(CONFIG, rate=0.04))
    trained(tmp_path, replace(CONFIG, save_every=2, log_every=5, accumulate=2))
    with pytest.raises(ModelError, match="another architecture or width: 2 parameters differ"):
        trained(tmp_path, hidden=7, same_outer=True)
    path = tmp_path / "checkpoints/00000008.weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StorageError, match=r"00000008 is damaged \(weights have another checksum"):
        trained(tmp_path)
    (tmp_path / "checkpoints/00000008.json").write_text("{")
    with pytest.raises(StorageError, match="is damaged"):
        trained(tmp_path)
    (tmp_path / "checkpoints/00000008.json").unlink()
    trained(tmp_path)


def test_groups_have_rates_and_decays_of_their_own(tmp_path):
    still = ParameterGroup(pattern=r"^outer", rate=0.0)
    weights, _ = trained(tmp_path / "a", replace(CONFIG, groups=(still,)))
    before = dict(fakes.new_model().named_parameters())
    assert torch.equal(weights["outer.weight"], before["outer.weight"])
    assert not torch.equal(weights["inner.weight"], before["inner.weight"])
    plain = ParameterGroup(pattern="bias", decay=0.0)
    ours, _ = trained(tmp_path / "b", replace(CONFIG, groups=(plain,)))
    assert not torch.equal(ours["inner.bias"], trained(tmp_path / "c")[0]["inner.bias"])
    with pytest.raises(ConfigError, match=r"no trained parameter belongs to the groups \['x'\]"):
        trained(tmp_path / "d", replace(CONFIG, groups=(ParameterGroup(pattern="x"),)))


def test_gradients_are_clipped(tmp_path):
    clipped, found = trained(tmp_path, replace(CONFIG, clip_norm=1e-6, steps=1, decay=0.0))
    assert found["history"][0]["norm"] > 1e-6  # as it was before
    moved = fakes.new_model().outer.weight - clipped["outer.weight"]
    assert moved.abs().max() <= 0.0501


def test_bfloat16_trains_nearly_the_same(undisturbed, tmp_path):
    weights, _ = trained(tmp_path, replace(CONFIG, precision="bfloat16"))
    assert all(value.dtype == torch.float32 for value in weights.values())
    for name, value in weights.items():
        np.testing.assert_allclose(value, undisturbed[0][name], atol=0.1)


def test_schedules():
    poly = TrainingConfig(steps=100, rate=1.0, least_rate=0.1, warm_up=10)
    assert rate_at(0, poly) == pytest.approx(1e-6, rel=1e-3)
    assert rate_at(5, poly) == pytest.approx((0.1 + 0.9 * 0.95**0.9) * (0.5 + 5e-7))
    assert rate_at(50, poly) == pytest.approx(0.1 + 0.9 * 0.5**0.9)
    assert rate_at(99, poly) == pytest.approx(0.1 + 0.9 * 0.01**0.9)
    steps = TrainingConfig(steps=100, rate=1.0, schedule="step", milestones=(30, 60))
    assert [rate_at(n, steps) for n in (29, 30, 60)] == pytest.approx([1, 0.1, 0.01])
    assert rate_at(99, replace(steps, least_rate=0.05)) == 0.05
    assert rate_at(99, TrainingConfig(steps=100, rate=0.5, schedule="constant")) == 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"batch": 6, "accumulate": 4}, "accumulate must divide batch"),
        ({"milestones": (3,)}, "give milestones with schedule step"),
        ({"schedule": "step"}, "give milestones with schedule step"),
        ({"least_rate": 1.0}, "least_rate must be in"),
        ({"clip_norm": 0.0}, "clip_norm must be above 0"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **changes)


def test_a_pattern_must_be_a_regular_expression():
    with pytest.raises(ValueError, match="must be a regular expression"):
        ParameterGroup(pattern="(")


def test_a_model_without_anything_to_train_is_refused(tmp_path):
    with pytest.raises(ModelError, match="nothing of the model requires gradients"):
        trained(tmp_path, frozen=("inner", "outer"))


def test_tensorboard_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    for name in [n for n in sys.modules if n.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(MissingPackageError, match=r"pip install 'ovref\[tensorboard\]'"):
        trained(tmp_path, replace(CONFIG, tensorboard=True))


def test_the_history_is_written_for_tensorboard(undisturbed, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trained(tmp_path, replace(CONFIG, tensorboard=True))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    history = undisturbed[1]["history"]
    assert found == [(row["step"], pytest.approx(row["loss"], rel=1e-6)) for row in history]


def run_fakes(folder, **variables):
    """A process that trains the fakes' model as this test does."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path]), **variables}
    return subprocess.Popen(
        [sys.executable, fakes.__file__, str(folder)], env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_a_killed_process_goes_on_to_the_same_weights(undisturbed, tmp_path):
    killed = run_fakes(tmp_path, SLEEP="0.5")
    path = tmp_path / "checkpoints/00000003.json"
    deadline = time.monotonic() + 120
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert checkpoints.steps_saved(Store.open(str(tmp_path)))[-1] < 8
    assert same(trained(tmp_path)[0], undisturbed[0])


@pytest.mark.slow
def test_two_workers_train_what_one_does(undisturbed, tmp_path):
    """Two processes of gloo, each with half of every batch."""
    port = str(29500 + os.getpid() % 1000)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    workers = [run_fakes(tmp_path, RANK=str(rank), **address) for rank in range(2)]
    for process in workers:
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
    store = Store.open(str(tmp_path))
    found = checkpoints.read(store, 8)
    for name, value in found.weights.items():
        np.testing.assert_allclose(value, undisturbed[0][name], rtol=1e-4, atol=1e-6)
    losses = [row["loss"] for row in found.history]
    assert losses == pytest.approx([row["loss"] for row in undisturbed[1]["history"]], rel=1e-4)
    described = json.loads((Path(tmp_path) / "checkpoints/00000008.json").read_text())
    assert described["identity"]["training"]["batch"] == 4
