"""Checkpoints give back what was put in, and are there in full or not at all."""

import numpy as np
import pytest
import torch

from ctrlrl.runs.checkpoint import load_checkpoint, pack, save_checkpoint, unpack


def test_everything_comes_back_as_it_was(tmp_path):
    shared = torch.arange(6.0)
    state = {
        "tensors": [shared, shared[2:4], shared.view(2, 3).T, torch.tensor(3), torch.zeros(0, 2)],
        "types": [
            torch.ones(2, dtype=t) for t in (torch.bool, torch.uint8, torch.int64, torch.float64, torch.bfloat16)
        ],
        "arrays": {"scalar": np.float64(2.5), "point": np.array(1.5), "rows": np.arange(6).reshape(2, 3)[:, 1:]},
        "numbers": [1, 2**200, 0.1, float("inf"), True, None, "text"],
        "a": {"b": torch.zeros(1)},
        "a/b": torch.ones(1),
    }
    path = save_checkpoint(tmp_path, "step-1", state)
    back = load_checkpoint(path)
    for x, y in zip(state["tensors"] + state["types"], back["tensors"] + back["types"], strict=True):
        assert torch.equal(x, y)
        assert x.dtype == y.dtype
    assert back["arrays"]["point"].shape == ()
    assert np.array_equal(back["arrays"]["rows"], state["arrays"]["rows"])
    assert back["numbers"] == state["numbers"]
    assert (back["a"]["b"].item(), back["a/b"].item()) == (0.0, 1.0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-1"]


def test_no_checkpoint_is_ever_rewritten(tmp_path):
    save_checkpoint(tmp_path, "step-1", {"x": 1})
    with pytest.raises(FileExistsError):
        save_checkpoint(tmp_path, "step-1", {"x": 2})
    assert load_checkpoint(tmp_path / "step-1") == {"x": 1}


@pytest.mark.parametrize("value", [{1, 2}, object(), b"bytes", {3: "x"}])
def test_what_cannot_be_kept_without_pickle_is_refused(value):
    with pytest.raises(TypeError):
        pack({"x": value})


def test_packing_copies():
    x = torch.zeros(2)
    tensors, tree = pack({"x": x})
    x += 1
    assert unpack(tensors, tree)["x"].tolist() == [0, 0]
