import pytest
import torch

import shapes
from coco_utils import dataset_paths
from fake_data import NUM_BATCHES, FakeDataset, FakeLoader


def test_batches_are_like_those_of_a_loader():
    dataset = FakeDataset(with_masks=True)
    images, targets = dataset.batch(0, 3)
    assert len(images) == len(targets) == 3
    for image, target in zip(images, targets, strict=True):
        _, height, width = image.shape
        assert image.dtype == torch.uint8 and (height, width) in {
            (480, 640),
            (427, 640),
            (640, 480),
            (640, 427),
        }
        boxes, count = target["boxes"], len(target["labels"])
        assert boxes.dtype == torch.float32 and boxes.shape == (count, 4) and 1 <= count <= 13
        assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] > boxes[:, :2]).all()
        assert (boxes[:, 2:] <= torch.tensor([width, height])).all()
        assert 1 <= target["labels"].min() <= target["labels"].max() <= 80
        masks = target["masks"]
        assert masks.size == (height, width) and len(masks) == count
        # a mask lies in its box, and fills between 0.6² and all of the ellipse in it, but for what rounding does
        area = torch.tensor([masks.bitmap(n).sum() for n in range(count)])
        ellipse = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1) * torch.pi / 4
        assert (area > 0.3 * ellipse).all() and (area < 1.2 * ellipse).all()
    wide = [image.shape[2] >= image.shape[1] for image in images]
    assert len(set(wide)) == 1  # as the sampler groups them


def test_the_same_seed_gives_the_same_batches():
    first, again, other = FakeDataset(seed=1), FakeDataset(seed=1), FakeDataset(seed=2)
    assert torch.equal(first.batch(5, 1)[0][0], again.batch(5, 1)[0][0])
    assert not torch.equal(first.batch(5, 1)[0][0][0, :9, :9], other.batch(5, 1)[0][0][0, :9, :9])


def test_sizes_and_classes_come_from_a_file_whose_images_are_never_read(tmp_path):
    root = shapes.write_shapes(tmp_path, num_train=3, num_val=1)
    folder, annotations = dataset_paths(root, keypoints=True)["train"]
    for image in folder.iterdir():
        image.unlink()
    dataset = FakeDataset(annotations, with_masks=False, with_keypoints=True)
    assert (dataset.classes, len(dataset)) == (["star"], 3)
    (image,), (target,) = dataset.batch(0, 1)
    assert list(image.shape[1:]) in dataset.sizes
    assert "masks" not in target
    assert target["keypoints"].shape == (len(target["labels"]), dataset.num_keypoints, 3)


@pytest.mark.parametrize("num_images", [1, 7, 100])
def test_the_loader_goes_round_its_batches(num_images):
    dataset = FakeDataset(with_masks=False)
    dataset.num_images = num_images
    loader = FakeLoader(dataset, 2, num_ranks=2)
    length = max(1, num_images // 4)
    assert len(loader) == len(loader.batch_sampler) == length
    batches = list(loader)
    assert len(batches) == length
    assert all(batches[n] is batches[n % NUM_BATCHES] for n in range(length))
    loader.batch_sampler.set_epoch(3, start_batch=length - 1)
    assert len(list(loader)) == 1


def test_ranks_have_batches_of_their_own():
    dataset = FakeDataset(with_masks=False)
    dataset.num_images = 4
    first, second = (FakeLoader(dataset, 1, rank=rank, num_ranks=2) for rank in range(2))
    images = [batch[0][0] for loader in (first, second) for batch in loader.batches]
    assert len(images) == 4
    assert len({image[0, :9, :9].numpy().tobytes() for image in images}) == 4
