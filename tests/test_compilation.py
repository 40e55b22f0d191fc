import pytest
import torch
from test_models import one_batch

import compilation
import models
from rcnn import shape_buckets


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def make(name, **options):
    torch.manual_seed(0)
    backbone = None if "mobilenet" in name or "ssd" in name else "resnet18"
    model, _ = models.build_model(name, 4, backbone=backbone, min_size=64, max_size=96, **options)
    return model


def step(model, *sizes):
    """The losses of a batch of images of these sizes, and a backward pass."""
    images, targets = one_batch()
    generator = torch.Generator().manual_seed(1)
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator) for size in sizes]
    torch.manual_seed(2)
    losses = model(images, targets)
    sum(losses.values()).backward()
    return {name: loss.detach() for name, loss in losses.items()}


@pytest.mark.slow
def test_nothing_is_compiled_after_every_bucket_has_been_seen():
    """Images of any size within two buckets; the graphs of each are made once, for training and for evaluation."""
    model = make("fasterrcnn_resnet50_fpn", norm="frozen")
    compilation.compile_regions(model, backend="aot_eager")
    before = compilation.num_graphs()
    for training in (True, False):
        model.train(training)
        with torch.set_grad_enabled(training):
            step(model, (48, 64), (48, 64)) if training else model(one_batch()[0])
    step(model.train(), (64, 48), (60, 48))
    warm = compilation.num_graphs()
    assert warm > before
    step(model, (48, 60), (40, 55))
    step(model, (60, 44), (64, 48))
    with torch.no_grad():
        model.eval()(one_batch()[0])
    assert compilation.num_graphs() == warm


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn", "ssdlite320_mobilenet_v3_large"]
)
def test_compiled_regions_change_no_loss(name):
    model = make(name)
    plain = step(model.train(), (48, 64), (48, 64))
    model.zero_grad()
    before = compilation.num_graphs()
    if hasattr(model.transform, "buckets"):
        model.transform.buckets = ()
    compilation.compile_regions(model, backend="aot_eager")
    keys = list(model.state_dict())
    compiled = step(model.train(), (48, 64), (48, 64))
    assert compilation.num_graphs() > before and list(model.state_dict()) == keys
    for loss, value in plain.items():
        torch.testing.assert_close(compiled[loss], value, rtol=1e-4, atol=1e-5)


def test_buckets_of_coco():
    buckets = shape_buckets(800, 1333)
    assert buckets == [
        (800, 1088), (1088, 800), (800, 1216), (1216, 800), (800, 1344), (1344, 800), (1344, 1344),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("sizes", "padded"),
    [
        ([(800, 1066)], (800, 1088)),
        ([(800, 1089), (600, 700)], (800, 1216)),
        ([(1333, 800)], (1344, 800)),
        ([(800, 1333), (1333, 800)], (1344, 1344)),
        ([(100, 100)], (800, 1088)),
    ],
)
def test_a_batch_is_padded_to_the_smallest_bucket_that_holds_it(sizes, padded):
    model = make("fasterrcnn_resnet50_fpn")
    model.transform.buckets = shape_buckets(800, 1333)
    assert model.transform.padded_size(sizes) == padded


def test_buckets_hold_every_size_that_images_are_resized_to():
    model = make("fasterrcnn_resnet50_fpn").eval()
    for min_size, max_size in ((64, 96), (100, 90), (65, 130)):
        model.transform.min_size, model.transform.max_size = (min_size,), max_size
        model.transform.buckets = shape_buckets(min_size, max_size)
        for height, width in ((30, 500), (500, 30), (77, 77), (400, 300)):
            size = model.transform.resized_size(height, width)
            assert model.transform.padded_size([size]) in model.transform.buckets
