"""The batched RPN against torchvision's: same weights, images, targets and sampled anchors, same numbers.

Tolerances: losses 1e-5 relative and gradients 1e-4 of their largest value in float32; under bf16 autocast, against
float32, 1% of the losses and 10% of the gradients' norms (measured 0.05% and 4.7%, the dense backward's being the
same). Proposals are equal to the bit.
"""

import copy

import pytest
import torch
from test_boxes import HostWaits
from torch import nn
from torchvision.models.detection import fasterrcnn_resnet50_fpn_v2
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import AnchorGenerator, RPNHead
from torchvision.models.detection.rpn import RegionProposalNetwork as TorchvisionRPN

import rpn as rpn_module
from boxes import suppress_batched
from rpn import MAX_CACHED_SHAPES, RegionProposalNetwork, is_plain_head

CHANNELS = 16
STRIDES = (4, 8, 16, 32, 64)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(30)


def make_rpn(depth=1, pre_nms_top_n=400, post_nms_top_n=300, score_thresh=0.0, head=None):
    """torchvision's RPN with weights large enough that scores and boxes vary."""
    head = head or RPNHead(CHANNELS, 3, conv_depth=depth)
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.1)
    anchor_generator = AnchorGenerator(((32,), (64,), (128,), (256,), (512,)), ((0.5, 1.0, 2.0),) * 5)
    top_n = [{"training": n, "testing": n // 2} for n in (pre_nms_top_n, post_nms_top_n)]
    return TorchvisionRPN(anchor_generator, head, 0.7, 0.3, 256, 0.5, *top_n, 0.7, score_thresh)


def make_inputs(*image_sizes, dtype=torch.float32, memory_format=torch.channels_last):
    """Images padded to a multiple of 32 and random features of the FPN's shapes that require grad."""
    height, width = (-(-max(side) // 32) * 32 for side in zip(*image_sizes, strict=True))
    images = ImageList(torch.zeros(len(image_sizes), 3, height, width), list(image_sizes))
    features = {}
    for name, stride in enumerate(STRIDES):
        level = torch.randn(
            len(image_sizes), CHANNELS, -(-height // stride), -(-width // stride), dtype=dtype
        )
        features[str(name)] = level.to(memory_format=memory_format).requires_grad_()
    return images, features


def make_targets(*counts, side=180):
    targets = []
    for n in counts:
        corner = torch.rand(n, 2) * side
        boxes = torch.cat([corner, corner + torch.rand(n, 2) * 100 + 4], dim=1)
        targets.append({"boxes": boxes, "labels": torch.randint(1, 91, (n,))})
    return targets


def make_keys(images, features):
    """Keys for the sampler: one per anchor, three anchors a place."""
    return torch.rand(len(images.image_sizes), sum(f.shape[2] * f.shape[3] * 3 for f in features.values()))


class SampleThese:
    """Stands in for torchvision's sampler and draws what ours drew."""

    def __init__(self, num_anchors, indices, is_positive, valid):
        self.masks = []
        for kind in (valid & is_positive, valid & ~is_positive):
            mask = torch.zeros(len(indices), num_anchors, dtype=torch.uint8)
            for image, (chosen, use) in enumerate(zip(indices, kind, strict=True)):
                mask[image, chosen[use]] = 1
            self.masks.append(list(mask))

    def __call__(self, labels):
        return self.masks


def run_torchvision(theirs, ours, images, features, targets, keys):
    """torchvision's proposals and losses for the anchors that ours would sample."""
    anchors = ours.anchor_grid(images, list(features.values())).anchors
    indices, is_positive, valid, _ = ours.sample_anchors(anchors, targets, keys)
    theirs = copy.copy(theirs)  # the same submodules, another sampler
    theirs.fg_bg_sampler = SampleThese(len(anchors), indices, is_positive, valid)
    return theirs(images, features, targets)


def gradients(module, features, losses):
    """Gradients of the summed losses in the module's parameters and the features, by name."""
    inputs = {**dict(module.named_parameters()), **features}
    return dict(zip(inputs, torch.autograd.grad(sum(losses.values()), list(inputs.values())), strict=True))


def assert_same_proposals(ours, theirs):
    for boxes, valid, expected in zip(*ours, theirs, strict=True):
        assert torch.equal(boxes[valid], expected)
        assert (boxes[~valid] == 0).all()


UNEQUAL = ((250, 300), (256, 190))


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("counts", [(5, 0), (1, 300), (0, 0)])
def test_losses_gradients_and_proposals_are_torchvisions(counts, depth, sparse):
    theirs = make_rpn(depth)
    ours = RegionProposalNetwork.from_torchvision(theirs)
    assert ours.sparse_backward
    ours.sparse_backward = sparse
    images, features = make_inputs(*UNEQUAL)
    targets, keys = make_targets(*counts), make_keys(images, features)
    expected_boxes, expected = run_torchvision(theirs, ours, images, features, targets, keys)
    proposals, losses = ours(images, features, targets, keys)
    assert_same_proposals(proposals, expected_boxes)
    assert list(losses) == list(expected)
    for name in expected:
        torch.testing.assert_close(losses[name], expected[name], rtol=1e-5, atol=0)
    grads, expected_grads = gradients(ours, features, losses), gradients(theirs, features, expected)
    assert list(grads) == list(expected_grads)
    for name, grad in expected_grads.items():
        assert (grads[name] - grad).abs().max() <= 1e-4 * grad.abs().max(), name


def test_samples_at_the_border_see_the_zero_padding():
    """Every anchor of the smallest maps is sampled: 4 levels of 1 or 2 places a side are nothing but border."""
    theirs = make_rpn(depth=2)
    ours = RegionProposalNetwork.from_torchvision(theirs)
    images, features = make_inputs((30, 60))
    grid = ours.anchor_grid(images, list(features.values()))
    indices = torch.arange(len(grid.anchors))[None]
    logits, deltas = rpn_module.sparse_head(ours.head, list(features.values()), indices, grid.levels)
    dense = ours.head(list(features.values()))
    expected = [
        torch.cat([rpn_module.places_last(f, n) for f in d], 1) for d, n in zip(dense, (1, 4), strict=True)
    ]
    torch.testing.assert_close(logits, expected[0].squeeze(2), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(deltas, expected[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_any_memory_format(memory_format):
    theirs = make_rpn()
    ours = RegionProposalNetwork.from_torchvision(theirs)
    images, features = make_inputs((128, 160), (160, 128), memory_format=memory_format)
    targets, keys = make_targets(4, 3, side=60), make_keys(images, features)
    _, expected = run_torchvision(theirs, ours, images, features, targets, keys)
    _, losses = ours(images, features, targets, keys)
    grads, expected_grads = gradients(ours, features, losses), gradients(theirs, features, expected)
    for name, grad in expected_grads.items():
        assert (grads[name] - grad).abs().max() <= 1e-4 * grad.abs().max(), name


@pytest.mark.parametrize("sparse", [True, False])
def test_bf16_autocast_is_close_to_float32(sparse):
    """And the losses are float32. Seen in the norms of the gradients: single values round in many places."""
    ours = RegionProposalNetwork.from_torchvision(make_rpn(depth=2))
    ours.sparse_backward = sparse
    images, features = make_inputs(*UNEQUAL)
    targets, keys = make_targets(6, 40), make_keys(images, features)
    _, expected = ours(images, features, targets, keys)
    expected_grads = gradients(ours, features, expected)
    half = {name: level.detach().bfloat16().requires_grad_() for name, level in features.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        proposals, losses = ours(images, half, targets, keys)
    assert proposals.boxes.dtype == torch.float32
    for name in expected:
        assert losses[name].dtype == torch.float32
        torch.testing.assert_close(losses[name], expected[name], rtol=1e-2, atol=0)
    for name, grad in gradients(ours, half, losses).items():
        assert grad.dtype == (torch.bfloat16 if name in half else torch.float32)
        assert (grad - expected_grads[name]).norm() <= 0.1 * expected_grads[name].norm(), name


def test_bf16_autocast_rounds_like_the_dense_backward():
    """The sparse gradient strays from float32 no further than twice as far as the dense one does."""
    ours = RegionProposalNetwork.from_torchvision(make_rpn())
    images, features = make_inputs(*UNEQUAL, dtype=torch.bfloat16)
    targets, keys = make_targets(6, 40), make_keys(images, features)
    exact_features = {name: level.detach().float().requires_grad_() for name, level in features.items()}
    exact = gradients(ours, exact_features, ours(images, exact_features, targets, keys)[1])
    strays = {}
    for ours.sparse_backward in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            _, losses = ours(images, features, targets, keys)
        grads = gradients(ours, features, losses)
        strays[ours.sparse_backward] = {name: (grads[name].float() - exact[name]).norm() for name in exact}
    for name in exact:
        assert strays[True][name] <= 2 * strays[False][name] + 1e-3 * exact[name].norm(), name


@pytest.mark.parametrize("num_images", [1, 2])
def test_eval_proposals_are_torchvisions(num_images):
    """2,500 candidates an image: above 1,000, torchvision suppresses each level by itself as we do."""
    theirs = make_rpn(pre_nms_top_n=1600).eval()
    ours = RegionProposalNetwork.from_torchvision(theirs)
    assert not ours.training
    images, features = make_inputs(*((250, 300), (320, 256))[:num_images])
    expected, _ = theirs(images, features)
    proposals, losses = ours(images, features)
    assert proposals.boxes.shape == (num_images, 150, 4)
    assert not proposals.boxes.requires_grad
    assert losses == {}
    assert_same_proposals(proposals, expected)


def test_scores_below_the_threshold_and_small_boxes_are_dropped():
    """Half of the scores pass 0.5; boxes clipped to nothing beside the image are dropped."""
    theirs = make_rpn(score_thresh=0.5).eval()
    nn.init.normal_(theirs.head.bbox_pred.weight, std=3)  # throws many boxes out of the image
    ours = RegionProposalNetwork.from_torchvision(theirs)
    images, features = make_inputs((60, 90), (96, 64))
    expected, _ = theirs(images, features)
    proposals, _ = ours(images, features)
    assert 0 < len(expected[0]) < 150
    assert_same_proposals(proposals, expected)


def test_images_smaller_than_the_number_of_proposals():
    """32×32 pixels: 8×8, 4×4, 2×2, 1 and 1 places of 3 anchors, 258 candidates for 300 proposals."""
    theirs = make_rpn()
    ours = RegionProposalNetwork.from_torchvision(theirs)
    images, features = make_inputs((32, 32))
    proposals, losses = ours(images, features, make_targets(1, side=5))
    assert proposals.boxes.shape == (1, 300, 4)
    assert 0 < proposals.valid.sum() <= 258
    assert all(loss.isfinite() for loss in losses.values())
    assert_same_proposals(proposals, theirs(images, features, make_targets(1, side=5))[0])


def test_losses_of_images_with_fewer_anchors_than_samples():
    """258 anchors an image for 400 samples: both losses divide by the anchors drawn, not by the slots."""
    theirs = make_rpn()
    theirs.fg_bg_sampler.batch_size_per_image = 400
    ours = RegionProposalNetwork.from_torchvision(theirs)
    images, features = make_inputs((32, 32), (32, 20))
    targets, keys = make_targets(3, 0, side=10), make_keys(images, features)
    _, expected = run_torchvision(theirs, ours, images, features, targets, keys)
    _, losses = ours(images, features, targets, keys)
    for name in expected:
        torch.testing.assert_close(losses[name], expected[name], rtol=1e-5, atol=0)


def test_of_equal_scores_the_lower_level_comes_first():
    """A head of zero weights scores everything 0.5 and moves nothing: every proposal is a clipped anchor."""
    theirs = make_rpn(pre_nms_top_n=8, post_nms_top_n=1000)
    for parameter in theirs.head.parameters():
        nn.init.zeros_(parameter)
    ours = RegionProposalNetwork.from_torchvision(theirs.eval())
    images, features = make_inputs((64, 64))
    proposals, _ = ours(images, features)
    areas = (proposals.boxes[..., 2:] - proposals.boxes[..., :2]).prod(dim=2)[0][proposals.valid[0]]
    # At most four a level survive, and the first level's anchors, about 32×32 pixels, come first; 128×128 and more
    # are clipped to most of the image.
    assert areas[0] <= 1100
    assert areas[-1] > 3000


def test_anchors_are_torchvisions_and_kept():
    """The last level of 800 rows has 13: torchvision's stride there is 800 // 13 = 61, not 64."""
    ours = RegionProposalNetwork.from_torchvision(make_rpn())
    images = ImageList(torch.zeros(2, 3, 800, 1088), [(800, 1066), (750, 1088)])
    features = [torch.zeros(2, 1, -(-800 // stride), -(-1088 // stride)) for stride in STRIDES]
    expected = ours.anchor_generator(images, features)
    grid = ours.anchor_grid(images, features)
    assert torch.equal(grid.anchors, expected[0])
    assert torch.equal(grid.anchors, expected[1])
    assert (
        grid.anchors[-3 * 17 - 1, :2].tolist() == (expected[0][-1, :2] - torch.tensor([0.0, 61.0])).tolist()
    )
    assert grid.levels.tolist() == [
        [0, 200, 272],
        [163200, 100, 136],
        [204000, 50, 68],
        [214200, 25, 34],
        [216750, 13, 17],
    ]
    assert ours.anchor_grid(images, [f.bfloat16() for f in features]).anchors is grid.anchors


def test_the_anchor_cache_is_bounded():
    ours = RegionProposalNetwork.from_torchvision(make_rpn())
    for width in range(1, MAX_CACHED_SHAPES + 5):
        images, features = make_inputs((32, 32 * width))
        ours.anchor_grid(images, list(features.values()))
    assert len(ours._grids) == MAX_CACHED_SHAPES


def test_anchors_made_while_predicting_can_be_trained_with():
    ours = RegionProposalNetwork.from_torchvision(make_rpn().eval())
    images, features = make_inputs((64, 96))
    with torch.inference_mode():
        ours(images, {name: level.detach() for name, level in features.items()})
    _, losses = ours.train()(images, features, make_targets(2, side=20))
    assert all(grad.isfinite().all() for grad in gradients(ours, features, losses).values())


def test_from_torchvision_shares_parameters_and_keys():
    theirs = fasterrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None, rpn_score_thresh=0.1).rpn
    ours = RegionProposalNetwork.from_torchvision(theirs)
    assert ours.sparse_backward
    assert [(k, v.data_ptr()) for k, v in ours.state_dict().items()] == [
        (k, v.data_ptr()) for k, v in theirs.state_dict().items()
    ]
    assert all(a is b for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert ours.score_thresh == 0.1
    assert (ours._pre_nms_top_n, ours._post_nms_top_n) == (theirs._pre_nms_top_n, theirs._post_nms_top_n)


class GroupedHead(RPNHead):
    """A head that the sparse way does not know."""

    def forward(self, features):
        return super().forward([level * 2 for level in features])


def test_another_head_takes_the_dense_way():
    theirs = make_rpn(head=GroupedHead(CHANNELS, 3))
    ours = RegionProposalNetwork.from_torchvision(theirs)
    assert not ours.sparse_backward
    images, features = make_inputs((128, 128))
    targets, keys = make_targets(3, side=40), make_keys(images, features)
    boxes, expected = run_torchvision(theirs, ours, images, features, targets, keys)
    proposals, losses = ours(images, features, targets, keys)
    assert_same_proposals(proposals, boxes)
    for name in expected:
        torch.testing.assert_close(losses[name], expected[name], rtol=1e-5, atol=0)


def test_a_head_of_other_convolutions_is_not_plain():
    head = RPNHead(CHANNELS, 3)
    assert is_plain_head(head)
    head.conv[0][0] = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=2, dilation=2)
    assert not is_plain_head(head)
    head.conv[0][0] = nn.Conv2d(CHANNELS, CHANNELS, 5, padding=2)
    assert not is_plain_head(head)


def test_training_without_targets_is_refused():
    ours = RegionProposalNetwork.from_torchvision(make_rpn())
    with pytest.raises(ValueError, match="needs targets in training mode"):
        ours(*make_inputs((64, 64)))


def test_the_training_path_waits_for_the_device_once(monkeypatch):
    """The one wait is the look at the end of the suppression in its form for devices, which runs here."""
    monkeypatch.setattr(
        rpn_module,
        "suppress",
        lambda boxes, scores, valid, threshold, lengths, num_keep: suppress_batched(
            boxes, valid, threshold, lengths
        ),
    )
    ours = RegionProposalNetwork.from_torchvision(make_rpn())
    images, features = make_inputs((128, 160), (160, 128))
    with HostWaits() as waits:
        _, losses = ours(images, features, make_targets(6, 0))
        sum(losses.values()).backward()
    assert waits.names == ["_local_scalar_dense"]


def test_on_the_cpu_only_the_suppression_has_shapes_that_depend_on_data(monkeypatch):
    """`nms` and what selects its candidates; nothing of it in the losses."""
    ours = RegionProposalNetwork.from_torchvision(make_rpn())
    images, features = make_inputs((128, 160), (160, 128))
    with HostWaits() as waits:
        ours(images, features, make_targets(6, 0))
    assert set(waits.names) == {"nonzero", "nms", "_local_scalar_dense"}
    monkeypatch.setattr(ours, "propose", lambda *args: None)
    with HostWaits() as waits:
        _, losses = ours(images, features, make_targets(6, 0))
        sum(losses.values()).backward()
    assert waits.names == []


def test_the_loss_path_is_one_graph(monkeypatch):
    """Nothing in it breaks a compiled region, and compiling changes neither losses nor gradients."""
    ours = RegionProposalNetwork.from_torchvision(make_rpn())
    monkeypatch.setattr(ours, "propose", lambda *args: None)
    images, features = make_inputs((64, 96), (96, 64))
    targets, keys = make_targets(3, 0, side=30), make_keys(images, features)
    _, expected = ours(images, features, targets, keys)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    _, losses = compiled(images, features, targets, keys)
    assert losses == expected
    grads, expected_grads = (gradients(ours, features, values) for values in (losses, expected))
    for name, grad in expected_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-5, atol=1e-7)
