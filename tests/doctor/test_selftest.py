"""The self-test detects mistakes in the kernels."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from pydrone.doctor import selftest
from pydrone.ops import dispatch, reference, triton


def wrong_gae(*args) -> None:
    reference.gae(*args)
    args[14][-1, -1] += 1e-3  # the last advantage of the last environment


def gae_without_statistics(*args) -> None:
    reference.gae(*args[:16], None, None)


def wrong_append(*args) -> None:
    reference.append(*args)
    if args[2][0, 0]:
        args[0][0][args[6], -1, 0] ^= 1  # a bit of the last environment's row


def append_without_codes(*args) -> None:
    reference.append(*args)
    args[0][1][:, args[6]] &= 1  # truncations become steps that do not end


def wrong_final_observation(*args) -> None:
    reference.append(*args)
    for pool in (x for x in args[0][1:] if x.dim() == 3):
        pool[0, 0, 1] ^= 0x40  # a bit in the exponent of the first half-precision number of the first final observation


def other_permutation(*args) -> None:
    reference.gather(*args[:12], args[12] + 1, *args[13:])


def gather_of_a_neighbour(*args) -> None:
    reference.gather(*args)
    if args[3]:
        args[3][-1][-1] += 1  # the last sample's last field


def gather_unshuffled(*args) -> None:
    reference.gather(*args[:15], False, *args[16:])


def raising(*args) -> None:
    raise RuntimeError("no kernel image\nis available")


MISTAKES = [
    ("gae", wrong_gae, "advantages of the rollout worked out by hand: differs"),
    ("gae", gae_without_statistics, "statistics of 1 x 1"),
    ("gae", raising, "RuntimeError no kernel image is available"),
    ("append", wrong_append, "of 1 x 1: differs from the expected in 1 places"),
    ("append", append_without_codes, "dones of 3 x 7"),
    ("append", wrong_final_observation, "values of the final observations of"),
    ("append", raising, "RuntimeError no kernel image is available"),
    ("gather", other_permutation, "indices of 3 x 7, minibatch 0 of epoch 0"),
    ("gather", gather_of_a_neighbour, "of 1 x 1, minibatch 0 of epoch 0: differs"),
    ("gather", gather_unshuffled, "indices of 3 x 7, minibatch 0 of epoch 0"),
    ("gather", raising, "RuntimeError no kernel image is available"),
]


@pytest.mark.parametrize(("kernel", "mistake", "message"), MISTAKES, ids=lambda x: getattr(x, "__name__", None))
def test_the_self_test_notices_a_mistake(kernel, mistake, message, monkeypatch):
    own = dispatch._operations
    planted = own("reference")._replace(**{kernel: mistake})
    monkeypatch.setattr(dispatch, "backends", lambda: dict.fromkeys(dispatch.NAMES))
    monkeypatch.setattr(dispatch, "_operations", lambda name: planted if name == "cpu" else own(name))
    monkeypatch.setattr(dispatch, "_cache", {})
    errors = {result["kernel"]: result["error"] for result in selftest.run("cpu", "cpu")}
    assert errors[kernel] is not None and message in errors[kernel]
    if kernel == "gather":  # the last kernel to run: its mistake affects no other
        assert errors["gae"] is None and errors["append"] is None


def test_the_self_test_passes(backend):
    results = {result["kernel"]: (result["cases"], result["error"]) for result in selftest.run(backend, "cpu")}
    # one by hand and 4 shapes x 2 memory orders x 3 bootstraps; 4 shapes; 4 shapes
    expected = {"gae": (25, None), "append": (4, None), "gather": (4, None)}
    if backend == "reference":  # as Triton; the native libraries have no loss
        expected["ppo_loss"] = (9, None)  # one by hand and 4 sizes x 2 sets of options
    assert results == expected


def loss_off_by(output: int, much: float) -> Callable[..., None]:
    def wrong(*args) -> None:
        reference.ppo_loss(*args)
        args[17 + output].view(-1)[-1] += much

    return wrong


def loss_without_a_sample(*args) -> None:
    rest = [x[:-1] if isinstance(x, torch.Tensor) and x.dim() and len(x) == len(args[0]) else x for x in args[2:10]]
    reference.ppo_loss(args[0][:-1], args[1], *rest, *args[10:17], args[17][:-1], args[18][:-1], *args[19:])


def loss_that_leaves_its_workspace(*args) -> None:
    reference.ppo_loss(*args)
    args[20].add_(args[21][0])
    args[21][0] += 1


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (loss_off_by(0, 1e-4), "mean_grad of the sample worked out by hand"),
        (loss_off_by(1, math.nan), "value_grad of the sample worked out by hand"),
        (loss_off_by(2, 1e-4), "std_grad of the sample worked out by hand"),
        (loss_off_by(3, 1e-3), "metrics of the sample worked out by hand"),
        (loss_without_a_sample, "mean_grad of"),
        (loss_that_leaves_its_workspace, "metrics of 1 x 1 from launch to launch"),
        (raising, "RuntimeError no kernel image is available"),
    ],
)
def test_the_self_test_notices_a_mistake_in_the_loss(mistake, message, monkeypatch):
    monkeypatch.setitem(selftest.LOSSES, "triton", mistake)
    with pytest.raises((selftest.Wrong, RuntimeError)) as found:
        selftest.check_ppo_loss("triton", "cpu")
    assert message in f"{type(found.value).__name__} {found.value}".replace("\n", " ")


def test_triton_has_the_loss_tested():
    assert list(selftest.kernels("triton")) == ["gae", "append", "gather", "ppo_loss"]
    assert selftest.LOSSES["triton"] is triton.ppo_loss


def test_the_speed_check_says_what_it_measured():
    before = torch.get_num_threads()
    found = selftest.speed("reference", "cpu", 1)
    assert torch.get_num_threads() == before
    assert found["threads"] == 1 and found["backend"] == "reference" and found["memcpy_gb_per_s"] > 0
    assert set(found["ratios"]) == {"append", "gae", "gather"}
    assert all(ratio > 1 for ratio in found["ratios"].values())  # the memcpy moves no more bytes than the kernels must
