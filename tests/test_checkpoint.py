import os
import pickle

import pytest
import torch
from torch import nn

import checkpoint as checkpoints
from utils import UserError


def example():
    model = nn.Linear(3, 2)
    return {
        "model": checkpoints.plain_state_dict(model),
        "progress": {"epoch": 1, "batch": 0, "step": 7},
        "classes": ["cat", "dog"],
        "category_ids": [3, 5],
        "norm": {"type": "frozen", "eps": 1e-5},
        "config": {"lr": 0.1},
    }


def test_what_is_saved_is_what_is_loaded(tmp_path):
    saved = example()
    checkpoints.save(saved, tmp_path / "checkpoint.pth", tmp_path / "model_0.pth", tmp_path / "best.pth")
    for name in ("checkpoint.pth", "model_0.pth", "best.pth"):
        loaded = checkpoints.load(tmp_path / name)
        assert torch.equal(loaded["model"]["weight"], saved["model"]["weight"])
        assert {k: v for k, v in loaded.items() if k != "model"} == {
            k: v for k, v in saved.items() if k != "model"
        }
    assert sorted(os.listdir(tmp_path)) == ["best.pth", "checkpoint.pth", "model_0.pth"]


def test_links_are_not_changed_by_the_next_save(tmp_path):
    first, second = example(), example()
    checkpoints.save(first, tmp_path / "checkpoint.pth", tmp_path / "model_0.pth")
    checkpoints.save(second, tmp_path / "checkpoint.pth")
    assert torch.equal(
        checkpoints.load(tmp_path / "model_0.pth")["model"]["weight"], first["model"]["weight"]
    )
    assert torch.equal(
        checkpoints.load(tmp_path / "checkpoint.pth")["model"]["weight"], second["model"]["weight"]
    )


def test_amending_changes_the_progress_under_all_names_of_a_checkpoint_and_of_no_other(tmp_path):
    first, second = example(), example()
    snapshot = tmp_path / ".evaluating.pth"
    checkpoints.save(first, tmp_path / "checkpoint.pth", tmp_path / "model_0.pth", snapshot)
    checkpoints.save(
        second, tmp_path / "checkpoint.pth"
    )  # the next one; the snapshot is still being evaluated
    checkpoints.amend(snapshot, {"best": 0.5, "best_epoch": 0}, tmp_path / "best.pth")
    for name in ("model_0.pth", "best.pth", ".evaluating.pth"):
        amended = checkpoints.load(tmp_path / name)
        assert amended["progress"] == {**first["progress"], "best": 0.5, "best_epoch": 0}
        assert torch.equal(amended["model"]["weight"], first["model"]["weight"])
    assert checkpoints.load(tmp_path / "checkpoint.pth")["progress"] == second["progress"]
    assert len(os.listdir(tmp_path)) == 4


def test_a_failed_save_leaves_the_previous_checkpoint_and_no_litter(tmp_path, monkeypatch):
    first = example()
    checkpoints.save(first, tmp_path / "checkpoint.pth")

    def disk_full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(example(), tmp_path / "checkpoint.pth")
    assert os.listdir(tmp_path) == ["checkpoint.pth"]
    assert torch.equal(
        checkpoints.load(tmp_path / "checkpoint.pth")["model"]["weight"], first["model"]["weight"]
    )


def flip_byte(path, value):
    """Flip one bit inside the stored weight."""
    data = bytearray(path.read_bytes())
    place = data.find(value.numpy().tobytes())
    assert place > 0
    data[place] ^= 1
    path.write_bytes(data)


def test_a_flipped_bit_inside_a_tensor_is_found(tmp_path):
    saved = example()
    checkpoints.save(saved, tmp_path / "checkpoint.pth")
    flip_byte(tmp_path / "checkpoint.pth", saved["model"]["weight"])
    with pytest.raises(UserError, match="damaged"):
        checkpoints.load(tmp_path / "checkpoint.pth")


def test_auto_resume_falls_back_to_the_checkpoint_before(tmp_path):
    saved = example()
    assert checkpoints.find_newest(tmp_path) == (None, None)
    checkpoints.save(example(), tmp_path / "model_3.pth")
    checkpoints.save(saved, tmp_path / "model_10.pth")
    (tmp_path / "checkpoint.pth").write_bytes(b"half a file")
    with pytest.warns(UserWarning, match="trying the one before"):
        path, loaded = checkpoints.find_newest(tmp_path)
    assert path.name == "model_10.pth"
    assert torch.equal(loaded["model"]["weight"], saved["model"]["weight"])


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("harm_done",)


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path, monkeypatch, write):
    monkeypatch.chdir(tmp_path)
    write({"model": Malicious()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"refused|damaged"):
        checkpoints.load(tmp_path / "evil.pth")
    assert not (tmp_path / "harm_done").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", r"damaged|refused"), (b"<html>", r"damaged|refused"), (None, "no such checkpoint")],
)
def test_what_is_no_checkpoint_is_named(tmp_path, content, message):
    path = tmp_path / "x.pth"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        checkpoints.load(path)


def test_bare_weights_are_sent_to_the_weights_flag(tmp_path):
    torch.save({"weight": torch.ones(1)}, tmp_path / "bare.pth")
    with pytest.raises(UserError, match="--weights"):
        checkpoints.load(tmp_path / "bare.pth")


def test_old_epochs_are_removed(tmp_path):
    for epoch in (1, 2, 10, 9):
        (tmp_path / f"model_{epoch}.pth").touch()
    (tmp_path / "model_mine.pth").touch()
    checkpoints.remove_old(tmp_path, keep=2)
    assert sorted(os.listdir(tmp_path)) == ["model_10.pth", "model_9.pth", "model_mine.pth"]


def test_other_classes_and_other_norms_are_refused():
    saved = example()
    checkpoints.check_same_classes(saved, ["cat", "dog"], [3, 5], "x.pth")
    with pytest.raises(UserError, match="only in the checkpoint: dog; only in the data: cow"):
        checkpoints.check_same_classes(saved, ["cat", "cow"], [3, 5], "x.pth")
    with pytest.raises(UserError, match="other category ids"):
        checkpoints.check_same_classes(saved, ["cat", "dog"], [1, 2], "x.pth")
    checkpoints.check_same_norm(saved, {"type": "frozen", "eps": 1e-5}, "x.pth")
    with pytest.raises(UserError, match="--norm frozen --norm-eps 1e-05"):
        checkpoints.check_same_norm(saved, {"type": "batch", "eps": 1e-5}, "x.pth")


def test_the_hash_sees_names_shapes_dtypes_and_values():
    base = checkpoints.content_hash({"a": torch.zeros(2, 3), "b": 1})
    for other in (
        {"a": torch.zeros(3, 2), "b": 1},
        {"a": torch.zeros(2, 3, dtype=torch.float64), "b": 1},
        {"c": torch.zeros(2, 3), "b": 1},
        {"a": torch.zeros(2, 3), "b": 2},
        {"a": torch.tensor([[0.0, 0, 0], [0, 0, -0.0]]), "b": 1},
    ):
        assert checkpoints.content_hash(other) != base
    assert checkpoints.content_hash({"a": torch.zeros(2, 3), "b": 1}) == base
    assert checkpoints.content_hash(torch.ones(2, dtype=torch.bfloat16))  # no numpy dtype of its own


def test_changed_settings_are_listed():
    assert checkpoints.changed_settings(
        {"lr": 0.1, "wd": 1, "resume": "a"}, {"lr": 0.2, "wd": 1, "resume": "b"}
    ) == ["lr: 0.1 -> 0.2"]
