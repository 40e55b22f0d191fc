"""Batches hold like shapes, depend on (seed, epoch) alone and are dealt evenly to the ranks."""

import numpy as np
import pytest

from group_by_aspect_ratio import GroupedBatchSampler, create_aspect_ratio_groups, evaluation_batches


def batches_of(sampler):
    return [[index for _, index in batch] for batch in sampler]


def test_groups_by_hand():
    # k = 1: edges 1/2, 1, 2; an image on an edge belongs to the bin above it.
    ratios = [0.4, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0]
    assert create_aspect_ratio_groups(ratios, 1).tolist() == [0, 1, 1, 2, 2, 3, 3]
    assert create_aspect_ratio_groups(ratios, 0).tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert create_aspect_ratio_groups(ratios, -1).tolist() == [0] * 7
    # k = 3: 640×480 lies above the five edges 0.5, 0.63, 0.79, 1, 1.26 and below the sixth, 2^(2/3) = 1.59.
    assert create_aspect_ratio_groups([640 / 480], 3).tolist() == [5]


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_all_ranks_get_as_many_full_batches_of_one_group(num_ranks):
    rng = np.random.default_rng(1)
    for _ in range(30):
        num_images, batch_size = int(rng.integers(12, 60)), int(rng.integers(1, 5))
        groups = rng.choice(4, num_images, p=[0.6, 0.3, 0.05, 0.05])
        ranks = [
            batches_of(GroupedBatchSampler(groups, batch_size, rank=rank, num_ranks=num_ranks, seed=3))
            for rank in range(num_ranks)
        ]
        assert {len(batches) for batches in ranks} == {num_images // (batch_size * num_ranks)}
        for step in zip(*ranks, strict=True):
            assert {len(batch) for batch in step} == {batch_size}
            assert len({groups[i] for batch in step for i in batch}) == 1


def test_without_groups_an_epoch_sees_each_image_once():
    sampler = GroupedBatchSampler(np.zeros(12, int), 3)
    assert sorted(index for batch in batches_of(sampler) for index in batch) == list(range(12))


def test_what_a_group_leaves_over_is_filled_from_the_group():
    # Groups of 3 and 5 images, batches of 4: 8 // 4 = 2 batches. One is full, from the group of 5; of the
    # leftovers (1 of it, 3 of the other) the larger makes the second, its 3 images and one of them again.
    groups = np.array([0, 0, 0, 1, 1, 1, 1, 1])
    for epoch in range(5):
        sampler = GroupedBatchSampler(groups, 4)
        sampler.set_epoch(epoch)
        first, second = batches_of(sampler)
        assert len(set(first)) == 4 and set(first) < {3, 4, 5, 6, 7}
        assert set(second) == {0, 1, 2} and len(second) == 4


def test_a_group_smaller_than_what_is_missing_repeats():
    # One image in group 1, 5 in group 0, batches of 3: one full, leftovers 2 and 1, so 2 and a repeat.
    sampler = GroupedBatchSampler([0, 0, 0, 0, 0, 1], 3)
    assert len(batches_of(sampler)) == 2
    # Three groups of one image: 3 // 3 = 1 batch, of one image three times.
    (batch,) = batches_of(GroupedBatchSampler([0, 1, 2], 3))
    assert len(batch) == 3 and len(set(batch)) == 1


def test_the_order_depends_on_seed_and_epoch_alone():
    groups = np.arange(40) % 2

    def order(seed, epoch):
        sampler = GroupedBatchSampler(groups, 4, seed=seed)
        sampler.set_epoch(epoch)
        return batches_of(sampler)

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(0, 2) and order(0, 1) != order(1, 1)


def test_ranks_share_what_one_rank_would_see():
    groups = np.random.default_rng(2).integers(0, 3, 50)
    alone = batches_of(GroupedBatchSampler(groups, 8))
    pair = [batches_of(GroupedBatchSampler(groups, 4, rank=rank, num_ranks=2)) for rank in range(2)]
    assert alone == [left + right for left, right in zip(*pair, strict=True)]


def test_keys_carry_the_epoch_and_an_epoch_resumes_anywhere():
    sampler = GroupedBatchSampler(np.zeros(20, int), 2)
    sampler.set_epoch(7)
    whole = list(sampler)
    assert {epoch for batch in whole for epoch, _ in batch} == {7}
    sampler.set_epoch(7, start_batch=4)
    assert list(sampler) == whole[4:]
    assert len(sampler) == 10
    sampler.set_epoch(8)
    assert len(list(sampler)) == 10


def test_too_few_images_are_refused_with_the_numbers():
    with pytest.raises(
        ValueError, match=r"7 training images do not fill one batch of 4 images on each of 2 ranks"
    ):
        GroupedBatchSampler(np.zeros(7, int), 4, num_ranks=2)
    with pytest.raises(ValueError, match="0 training images"):
        GroupedBatchSampler([], 1)
    with pytest.raises(ValueError, match="at least 1"):
        GroupedBatchSampler([0], 0)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        GroupedBatchSampler([0], 1, rank=2, num_ranks=2)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_an_evaluation_sees_every_image_once_in_the_same_batches(num_ranks):
    rng = np.random.default_rng(3)
    sizes = [tuple(size) for size in rng.integers(1, 5, (23, 2)).tolist()]
    alone = evaluation_batches(sizes, 4)
    ranks = [evaluation_batches(sizes, 4, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
    assert sorted(map(tuple, alone)) == sorted(tuple(batch) for batches in ranks for batch in batches)
    assert sorted(index for batch in alone for index in batch) == list(range(23))
    assert [len(batch) for batch in alone] == [4, 4, 4, 4, 4, 3]
    ratios = [sizes[index][1] / sizes[index][0] for batch in alone for index in batch]
    assert ratios == sorted(ratios)


def test_an_evaluation_of_fewer_images_than_ranks():
    assert [evaluation_batches([(2, 2)], 4, rank=rank, num_ranks=3) for rank in range(3)] == [[[0]], [], []]
    assert evaluation_batches([], 4) == []
