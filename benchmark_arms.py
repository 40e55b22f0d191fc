"""One arm of a comparison, in a process of its own: it does its share of the work when benchmark.py asks for it.

benchmark.py starts `python3 benchmark_arms.py` for each arm and writes one JSON object a line to it: first
{"call": "start", "arguments": {"kind", "arm", …}}, then calls of the arm's methods. Each is answered by one line:
{"result"}, {"unavailable"} where a peer is not installed, {"mistake"} for what the user can mend, or {"failed"}.
Between calls the process waits and does nothing.
"""

import contextlib
import functools
import itertools
import json
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FrozenBatchNorm2d

import benchmark_fake_data
import coco_eval
import coco_results
import coco_utils
import compilation
import engine
import models
import optim
import rcnn
import reference
import roi_align
import train
import utils
from benchmark_accuracy import TorchvisionRun
from benchmark_models import Workload, build_ours, build_torchvision, load_weights, write_weights
from group_by_aspect_ratio import GroupedBatchSampler, create_aspect_ratio_groups, evaluation_batches
from instruments import (
    Probe,
    ProductRecorder,
    StepTimer,
    device_ceilings,
    measure_rates,
    peak_memory_mb,
    synchronize,
    unique_memory_mb,
)
from transforms import SimpleCopyPaste, build_transforms
from utils import UserError

IMAGE_MEAN, IMAGE_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
# What our arms change of the usual settings: torchvision's own modules, one optimisation off, or one more on.
VARIANTS = {
    "ours": {},
    "ours-fp32": {"amp": False},
    "ours-reference-ops": {"reference_ops": True, "fold": False},
    "ours-reference-ops-fp32": {"reference_ops": True, "fold": False, "amp": False},
    "ours-folded": {"reference_ops": True},
    "ours-dense-rpn": {"sparse_rpn": False},
    "ours-unfolded": {"fold": False},
    "ours-roi-align-by-level": {"sparse_roi_align": False},
    "ours-channels-first": {"channels_last": False},
    "ours-default-allocator": {"keep_memory": False},
    "ours-compiled": {"compile": "default"},
    "ours-graphs": {"compile": "reduce-overhead"},
}
USUAL = {
    "amp": True,
    "reference_ops": False,
    "fold": True,
    "sparse_rpn": True,
    "sparse_roi_align": True,
    "channels_last": True,
    "keep_memory": True,
    "compile": None,
}


# --- training ------------------------------------------------------------------------------------------------


class Feed:
    """A loader of `count` batches, as engine.train_one_epoch asks for one; knows when the first one came."""

    def __init__(self, batches, count, mark=lambda name: None):
        self.batches, self.mark = batches, mark
        self.batch_sampler = range(count)
        self.first_batch_at, self.num_images = None, 0

    def __iter__(self):
        batches = iter(self.batches)
        while True:
            self.mark("optimizer")
            batch = next(batches, None)
            if batch is None:
                return
            self.mark("data")
            self.first_batch_at = self.first_batch_at or time.perf_counter()
            self.num_images += len(batch[0])
            yield batch


class Memory:
    """The same few batches again and again."""

    def __init__(self, batches):
        self.batches = batches
        self.rewind()

    def rewind(self):
        """Begin with the first batch again."""
        self.endless = itertools.cycle(self.batches)

    def take(self, count):
        return itertools.islice(self.endless, count)


class Loader:
    """A real loader; between two turns its pipeline is empty, so that nobody works outside of its turn."""

    def __init__(self, dataset, keys, collate, **options):
        self.keys, self.turn = keys, []
        self.rewind()
        self.loader = DataLoader(
            dataset, batch_sampler=self.turn, collate_fn=collate, generator=torch.Generator(), **options
        )

    def rewind(self):
        """Begin with the first batch again."""
        self.endless = itertools.cycle(self.keys)

    def take(self, count):
        self.turn[:] = itertools.islice(self.endless, count)
        return self.loader


class Trainer:
    """An arm of `benchmark.py train`. Subclasses build a model and know how to run steps on a Feed."""

    def __init__(self, arm, workload):
        torch.set_num_threads(workload.threads)
        self.arm, self.workload, self.device = arm, workload, torch.device(workload.device)
        self.dataset = workload.dataset(training=True)
        groups = create_aspect_ratio_groups(self.dataset.aspect_ratios, 3)
        self.keys = list(GroupedBatchSampler(groups, workload.batch_size, seed=workload.seed))
        self.state_dict, self.eps = load_weights(workload)
        self.lr = optim.default_lr("sgd", workload.batch_size)
        self.build()
        self.source = self.open_source()
        torch.manual_seed(workload.seed)

    def open_source(self):
        if self.workload.workers is not None:
            return self.open_loader(self.workload.workers)
        keys = self.keys[: self.workload.num_batches]
        samples = [[self.convert(*self.dataset[key]) for key in batch] for batch in keys]
        return Memory([coco_utils.collate(batch) for batch in samples])

    def convert(self, image, target):
        """A sample of CocoDataset as this arm's loader would have made it."""
        return image, target

    # Subclasses: build() makes self.model and self.optimizer; open_loader(workers) -> Loader; steps(feed) trains and
    # gives the losses of each step.

    def timed(self, mark):
        """A context in which the backward pass ends with mark("backward"), for loops that do not tell feed.mark."""
        return contextlib.nullcontext()

    def rewind(self):
        """Let the next step see the first batch: arms that took unequal numbers of steps meet again."""
        self.source.rewind()

    def turn(self, steps):
        """Run some steps. {"seconds" and "images" of a step}."""
        synchronize(self.device)
        feed = Feed(self.source.take(steps), steps)
        self.steps(feed)
        synchronize(self.device)
        seconds = time.perf_counter() - feed.first_batch_at
        return {"seconds": seconds / steps, "images": feed.num_images / steps}

    def trace(self, steps):
        """The losses of each of the next steps: a list of {name: value}."""
        return self.steps(Feed(self.source.take(steps), steps))

    def breakdown(self, steps):
        """{"seconds": {part of a step: seconds}, "padded_pixels", "positives" (an image)}, over steps run slower."""
        timer = StepTimer(self.device)
        self.rewind()  # to count the same batches in every arm
        with Probe(self.model, timer.mark) as probe, self.timed(timer.mark):
            self.steps(Feed(self.source.take(steps), steps, timer.mark))
        return {"seconds": {name: s / steps for name, s in timer.seconds.items()}, **probe.counts()}

    def products(self):
        """All products of one step; see instruments.ProductRecorder."""
        recorder = ProductRecorder()

        def enter(phase):
            recorder.phase = phase

        handles = [
            self.model.register_forward_pre_hook(lambda *_: enter("forward")),
            self.model.register_forward_hook(lambda *_: enter("backward")),
        ]
        with recorder:
            self.steps(Feed(self.source.take(1), 1))
        for handle in handles:
            handle.remove()
        return recorder.products()

    def memory(self):
        return peak_memory_mb(self.device)

    def count_syncs(self):
        """How often a step makes the host wait for the GPU, without the reading of losses every 20 steps."""

        def count(steps):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                self.steps(Feed(self.source.take(steps), steps))
                torch.cuda.set_sync_debug_mode("default")
            return sum("synchroniz" in str(warning.message) for warning in caught)

        return (count(3) - count(1)) / 2

    def compiled_graphs(self):
        return compilation.num_graphs()


class OurTrainer(Trainer):
    """engine.train_one_epoch itself, with the model and optimizer that train.py would build."""

    def build(self):
        self.options = SimpleNamespace(**{**USUAL, **VARIANTS[self.arm]})
        model = build_ours(self.workload, self.dataset, self.eps, self.options.reference_ops)
        model.load_state_dict(self.state_dict)
        if self.options.reference_ops and self.options.fold:
            rcnn.fold_frozen_batch_norms(model.backbone)
        if not self.options.fold:
            unfold(model)
        if not self.options.sparse_rpn:
            model.rpn.sparse_backward = False
        if not self.options.sparse_roi_align:
            roi_align.FeaturePyramid.roi_align = torchvision_roi_align  # for all of this process
        layout = torch.channels_last if self.options.channels_last else torch.preserve_format
        model.to(self.device, memory_format=layout)
        if self.options.compile:
            compilation.compile_regions(model, mode=self.options.compile)
        self.amp_dtype = utils.amp_dtype("auto", self.device) if self.options.amp else None
        self.model = model
        self.optimizer = optim.build_optimizer("sgd", optim.parameter_groups(model, 1e-4), self.lr, 0.9)
        for group in self.optimizer.param_groups:
            group["initial_lr"] = self.lr
        schedule = optim.LrSchedule("multisteplr", total_steps=10**6, warmup_steps=1000)
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp_dtype is torch.float16)
        self.state = engine.TrainState(model, self.optimizer, schedule, scaler, optim.Ema(model, 0.0))

    def convert(self, image, target):
        if self.device.type != "cuda":
            return image, target
        pinned = {name: v if name == "image_id" else v.pin_memory() for name, v in target.items()}
        return image.pin_memory(), pinned

    def open_loader(self, workers):
        self.dataset.transforms = build_transforms(
            "hflip", training=True, keypoint_flip=self.dataset.keypoint_flip
        )
        return Loader(
            self.dataset,
            self.keys,
            coco_utils.collate,
            num_workers=workers,
            pin_memory=self.device.type == "cuda",
            persistent_workers=workers > 0,
            worker_init_fn=coco_utils.init_worker,
        )

    def steps(self, feed, print_freq=20):
        records, self.state.batch = [], 0
        engine.train_one_epoch(
            self.state,
            feed,
            device=self.device,
            amp_dtype=self.amp_dtype,
            print_freq=print_freq,
            on_log=records.append,
            mark=feed.mark,
        )
        return [record["losses"] for record in records]

    def trace(self, steps):
        return self.steps(Feed(self.source.take(steps), steps), print_freq=1)

    def precision(self):
        return "fp32" if self.amp_dtype is None else str(self.amp_dtype).removeprefix("torch.")


def unfold(model):
    """Give convolutions and frozen batch norms that were folded their own work back."""
    for module in model.modules():
        if isinstance(module, rcnn.FoldedConv2d):
            module.__class__ = torch.nn.Conv2d
        elif isinstance(module, rcnn.FoldedBatchNorm2d):
            module.__class__ = FrozenBatchNorm2d


def torchvision_roi_align(pyramid, requests):
    """FeaturePyramid.roi_align by torchvision's own module: level by level, RoIs sorted by image and back."""
    pooled = []
    num_images = len(next(iter(pyramid.features.values())))
    for pool, boxes, image_index in requests:
        order = image_index.argsort(stable=True)
        counts = image_index.bincount(minlength=num_images).tolist()
        level = next(iter(pyramid.features.values()))
        size = (pyramid.image_height, pyramid.image_height * level.shape[3] / level.shape[2])
        found = pool(pyramid.features, list(boxes[order].split(counts)), [size] * num_images)
        pooled.append(found[order.argsort()].to(level.dtype))
    return pooled


class TorchvisionTrainer(Trainer):
    """torchvision's reference loop as its users run it; `torchvision-amp`: with its --amp."""

    def build(self):
        model = build_torchvision(self.workload, self.dataset, self.eps)
        model.load_state_dict(self.state_dict)
        self.model = model.to(self.device)
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(parameters, lr=self.lr, momentum=0.9, weight_decay=1e-4)
        self.scheduler = reference.warm_up(self.optimizer)
        self.scaler = torch.amp.GradScaler(self.device.type) if self.arm == "torchvision-amp" else None

    def convert(self, image, target):
        return reference.to_reference(image, target)

    def open_loader(self, workers):
        labels = {category_id: label for label, category_id in enumerate(self.dataset.category_ids, start=1)}
        dataset = reference.ReferenceDataset(
            self.workload.images, self.workload.annotations, reference.hflip, labels=labels
        )
        position = {image_id: number for number, image_id in enumerate(dataset.ids)}
        image_ids = self.dataset.image_ids
        keys = [[position[image_ids[index]] for _, index in batch] for batch in self.keys]
        return Loader(dataset, keys, reference.collate, num_workers=workers)

    def steps(self, feed):
        return reference.train_one_epoch(
            self.model, self.optimizer, self.scheduler, feed, self.device, self.scaler
        )

    @contextlib.contextmanager
    def timed(self, mark):
        handle = self.optimizer.register_step_pre_hook(lambda *_: mark("backward"))
        yield
        handle.remove()

    def precision(self):
        return "fp32" if self.scaler is None else "float16"


class Detectron2Trainer(TorchvisionTrainer):
    """detectron2's Mask R-CNN and its plain training loop, on images resized beforehand."""

    def build(self):
        workload = self.workload
        name = workload.backbone or "resnet50"
        if not workload.model.startswith("maskrcnn_resnet") or not name.startswith("resnet"):
            raise UserError(
                f"--against detectron2: its arm is a Mask R-CNN on a ResNet, not {workload.model}"
            )
        depth = int(name.removeprefix("resnet"))
        self.model = reference.build_detectron2(
            depth, len(self.dataset.classes), workload.min_size, workload.max_size, self.device
        )
        self.model.load_state_dict(reference.detectron2_state(self.state_dict), strict=False)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(parameters, lr=self.lr, momentum=0.9, weight_decay=1e-4)
        self.scheduler = reference.warm_up(self.optimizer)
        self.scaler = None

    def convert(self, image, target):
        index = self.dataset.index
        row = int(np.flatnonzero(index.image_ids == target["image_id"])[0])
        annotations = [
            n
            for n in range(index.first[row], index.first[row + 1])
            if index.has_mask[n] and not index.crowd[n]
        ]
        polygons = [index.segmentations[n] for n in annotations]
        if any(isinstance(polygon, dict) for polygon in polygons):
            raise UserError(
                f"--against detectron2: image {target['image_id']} has an RLE; its arm takes polygons alone"
            )
        sizes = self.workload.min_size, self.workload.max_size
        return reference.detectron2_input(image, target, polygons, *sizes), {}

    def open_loader(self, workers):
        raise UserError("--with-loader: detectron2's arm has no loader; leave it out of --against")

    def steps(self, feed):
        return reference.train_detectron2(self.model, self.optimizer, self.scheduler, feed)


def trainer(arm, workload):
    """The trainer of that name: ours and its VARIANTS, torchvision, torchvision-amp or detectron2."""
    if arm in VARIANTS:
        return OurTrainer(arm, workload)
    return Detectron2Trainer(arm, workload) if arm == "detectron2" else TorchvisionTrainer(arm, workload)


class CeilingArm:
    """Times the largest products of other arms' steps on their own. products: {arm: list}, see instruments.largest."""

    def __init__(self, arm, workload, products):
        torch.set_num_threads(workload.threads)
        self.device = torch.device(workload.device)
        self.products = products

    def turn(self):
        """{arm: {phase: FLOP/s}}"""
        return {arm: measure_rates(products, self.device) for arm, products in self.products.items()}

    def device_ceilings(self, side, megabytes):
        dtype = utils.amp_dtype("auto", self.device) or torch.float32
        return {"dtype": str(dtype), **device_ceilings(self.device, side, dtype, megabytes)}


# --- evaluation ----------------------------------------------------------------------------------------------


class Evaluator:
    """An arm of `benchmark.py eval`: forward passes, and whole evaluations. Arms: ours…, torchvision."""

    def __init__(self, arm, workload):
        torch.set_num_threads(workload.threads)
        self.arm, self.workload, self.device = arm, workload, torch.device(workload.device)
        self.dataset = workload.dataset()
        state, eps = load_weights(workload)
        self.is_ours = arm in VARIANTS
        if self.is_ours:
            reference_ops = VARIANTS[arm].get("reference_ops", False)
            self.model = build_ours(workload, self.dataset, eps, reference_ops)
        else:
            self.model = build_torchvision(workload, self.dataset, eps)
        self.model.load_state_dict(state)
        layout = torch.channels_last if self.is_ours else torch.preserve_format
        self.model.to(self.device, memory_format=layout).eval()
        amp = self.is_ours and VARIANTS[arm].get("amp", True)
        self.amp_dtype = utils.amp_dtype("auto", self.device) if amp else None

    def choose(self, batch_size):
        """Hold batches of like shapes of this size in memory."""
        keys = evaluation_batches(self.dataset.image_sizes, batch_size)
        step = max(1, len(keys) // self.workload.num_batches)  # spread over all shapes
        self.source = Memory([self.read(batch) for batch in keys[::step][: self.workload.num_batches]])

    def read(self, keys):
        images, targets = coco_utils.collate([self.dataset[key] for key in keys])
        if not self.is_ours:
            images = [image.float() / 255 for image in images]
        return images, [{"image_id": target["image_id"]} for target in targets]

    @torch.inference_mode()
    def forward(self, batches):
        """{"seconds", "images", "detections"} of forward passes; torchvision's also pastes the masks."""
        feed, num_detections = Feed(self.source.take(batches), batches), 0
        synchronize(self.device)
        started = time.perf_counter()
        for images, _ in feed:
            images = [image.to(self.device) for image in images]
            with engine.autocast(self.device, self.amp_dtype):
                outputs = self.model(images)
            num_detections += sum(len(output["scores"]) for output in outputs)
        synchronize(self.device)
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "images": feed.num_images, "detections": num_detections / feed.num_images}

    def results(self, batches):
        """{"seconds", "images"} from images in memory to COCO results, with RLEs: forward, paste, encode."""
        feed = Feed(self.source.take(batches), batches)
        started = time.perf_counter()
        if self.is_ours:
            self.predict(feed)
        else:
            kinds = [reference.box_results, reference.mask_results][: 1 + ("maskrcnn" in self.workload.model)]

            def consume(predictions):
                for to_results in kinds:
                    to_results(predictions)

            reference.evaluate(self.model, feed, self.device, self.dataset.category_ids, consume)
        return {"seconds": time.perf_counter() - started, "images": feed.num_images}

    def predict(self, loader):
        return engine.predict(
            self.model,
            loader,
            device=self.device,
            category_ids=self.dataset.category_ids,
            amp_dtype=self.amp_dtype,
        )

    def score(self, batch_size):
        """The metrics of the whole data set: {iou type: {name: number}}."""
        loader = map(self.read, evaluation_batches(self.dataset.image_sizes, batch_size))
        iou_types = models.iou_types(self.model)
        if self.is_ours:
            results = coco_results.gather_results(self.predict(loader), self.dataset.image_ids)
            return coco_eval.score_results(self.workload.annotations, results, iou_types)[0]
        truth = reference.ReferenceDataset(self.workload.images, self.workload.annotations).coco
        evaluator = reference.BatchEvaluator(truth, iou_types)
        reference.evaluate(self.model, loader, self.device, self.dataset.category_ids, evaluator.update)
        return evaluator.summarize()

    @torch.inference_mode()
    def breakdown(self, batches):
        """{"seconds": {stage: seconds an image}, "padded_pixels", "positives"}; what follows the heads is pasting."""
        timer = StepTimer(self.device)
        feed = Feed(self.source.take(batches), batches)
        with Probe(self.model, timer.mark) as probe:
            for images, _ in feed:
                images = [image.to(self.device) for image in images]
                with engine.autocast(self.device, self.amp_dtype):
                    self.model(images)
        seconds = {name: s / feed.num_images for name, s in timer.seconds.items() if name != "copy"}
        return {"seconds": seconds, **probe.counts()}

    def memory(self):
        return peak_memory_mb(self.device)


class AfterForward:
    """An arm of `benchmark.py eval`: what follows the forward pass, on made-up detections. Arms: ours, torchvision.

    Boxes and mask_probs of 100 detections an image become pasted masks, RLEs, results and COCO's 24 numbers.
    """

    def __init__(self, arm, workload, detections_per_image=100):
        torch.set_num_threads(workload.threads)
        self.is_ours = arm == "ours"
        self.workload, self.detections_per_image = workload, detections_per_image
        self.index = coco_utils.load_index(Path(workload.annotations))
        self.category_ids = self.index.category_ids.tolist()
        self.results = []
        if self.is_ours:
            self.truth = coco_eval.read_ground_truth(self.index)
        else:
            truth = reference.ReferenceDataset(workload.images, workload.annotations).coco
            self.evaluator = reference.BatchEvaluator(truth, ["bbox", "segm"])
        self.base = peak_memory_mb(torch.device("cpu"))

    def made_up(self, number):
        """The detections in one image, as a model's output: the same in all arms."""
        index = self.index
        objects = slice(index.first[number], index.first[number + 1])
        detections = benchmark_fake_data.made_up_detections(
            np.random.default_rng((self.workload.seed, number)),
            index.boxes[objects],
            index.labels[objects],
            len(index.classes),
            *index.sizes[number].tolist(),
            count=self.detections_per_image,
        )
        return {name: torch.from_numpy(value.copy()) for name, value in detections.items()}

    def turn(self, first, count):
        """Take in the detections of images first to first + count: {"seconds", "images"}."""
        seconds, last = 0.0, min(first + count, len(self.index.image_ids))
        for number in range(first, last):
            output = self.made_up(number)
            image_id, size = int(self.index.image_ids[number]), tuple(self.index.sizes[number].tolist())
            started = time.perf_counter()
            if self.is_ours:
                self.results += coco_results.predictions_to_results(
                    [output], [image_id], [size], self.category_ids
                )
            else:
                labels = torch.tensor(self.category_ids)[output["labels"] - 1]
                self.evaluator.update({image_id: {**reference.paste(output, *size), "labels": labels}})
            seconds += time.perf_counter() - started
        return {"seconds": seconds, "images": last - first}

    def score(self):
        """{"seconds", "metrics": {"bbox": {…}, "segm": {…}}} of everything taken in."""
        started = time.perf_counter()
        if self.is_ours:
            results = coco_results.gather_results(self.results, self.index.image_ids.tolist())
            metrics, _ = coco_eval.score_results(self.truth, results, ["bbox", "segm"])
        else:
            metrics = self.evaluator.summarize()
        return {"seconds": time.perf_counter() - started, "metrics": metrics}

    def memory(self):
        """Peaks, and what was held before the first detection."""
        return {**peak_memory_mb(torch.device("cpu")), "base_mb": self.base["host_mb"]}


# --- data ----------------------------------------------------------------------------------------------------


class DataArm:
    """An arm of `benchmark.py data`: samples of one policy on one thread. Arms: ours, torchvision.

    stage: "target" (decode, mirror, targets), "batch" (also resized, normalised and padded, ready to compute), "lsj"
    (large-scale jitter, mirror), "copypaste" (that, then simple copy-paste within the batch).
    """

    def __init__(self, arm, workload, stage):
        coco_utils.init_worker(0)
        torch.manual_seed(workload.seed)
        self.workload = workload
        policy = "lsj" if stage in ("lsj", "copypaste") else "hflip"
        self.dataset = self.open_ours(policy) if arm == "ours" else self.open_torchvision(policy)
        finishers = {
            "ours": {"batch": self.ready_batch, "copypaste": self.paste_objects},
            "torchvision": {"batch": self.reference_batch, "copypaste": self.reference_paste},
        }
        self.finish = finishers[arm].get(stage, coco_utils.collate)

    def open_ours(self, policy):
        dataset = self.workload.dataset(training=True)
        dataset.transforms = build_transforms(policy, training=True, keypoint_flip=dataset.keypoint_flip)
        return dataset

    def open_torchvision(self, policy):
        augment = {"lsj": reference.large_scale_jitter, "hflip": reference.hflip}[policy]
        data = reference.ReferenceDataset(self.workload.images, self.workload.annotations, augment)
        return Subset(data, reference.images_to_learn_from(data))

    def ready_batch(self, samples):
        transform = rcnn.FastTransform(self.workload.min_size, self.workload.max_size, IMAGE_MEAN, IMAGE_STD)
        return transform(*coco_utils.collate(samples))

    def reference_batch(self, samples):
        sizes = self.workload.min_size, self.workload.max_size
        images, targets = reference.collate(samples)
        return GeneralizedRCNNTransform(*sizes, IMAGE_MEAN, IMAGE_STD)(list(images), list(targets))

    def paste_objects(self, samples):
        return coco_utils.collate(SimpleCopyPaste()(samples, np.random.default_rng(self.workload.seed)))

    def reference_paste(self, samples):
        return reference.copy_paste(*reference.collate(samples))

    def turn(self, first, count):
        """{"seconds", "images"} of images first to first + count, around the data set's end."""
        started = time.perf_counter()
        for start in range(first, first + count, self.workload.batch_size):
            end = min(start + self.workload.batch_size, first + count)
            self.finish([self.dataset[index % len(self.dataset)] for index in range(start, end)])
        return {"seconds": time.perf_counter() - started, "images": count}

    def memory(self):
        return peak_memory_mb(torch.device("cpu"))


class StartupArm:
    """An arm of `benchmark.py startup`: from a fresh process to the first batch. Arms: ours, torchvision."""

    def __init__(self, arm, workload):
        self.imported = {"imports_mb": peak_memory_mb(torch.device("cpu"))["host_mb"]}
        torch.set_num_threads(workload.threads)
        started = time.perf_counter()
        open_loader = self.open_ours if arm == "ours" else self.open_torchvision
        self.loader = open_loader(workload)
        self.batches = iter(self.loader)
        next(self.batches)
        self.seconds = time.perf_counter() - started

    def open_ours(self, workload):
        dataset = workload.dataset(training=True)
        dataset.transforms = build_transforms("hflip", training=True, keypoint_flip=dataset.keypoint_flip)
        args = SimpleNamespace(
            aspect_ratio_group_factor=3, batch_size=workload.batch_size, seed=workload.seed
        )
        return train.build_train_loader(args, dataset, workload.workers or 0, torch.device("cpu"))

    def open_torchvision(self, workload):
        dataset = reference.ReferenceDataset(workload.images, workload.annotations, reference.hflip)
        positions = reference.images_to_learn_from(dataset)
        groups = create_aspect_ratio_groups(reference.aspect_ratios(dataset, positions), 3)
        sampler = GroupedBatchSampler(groups, workload.batch_size, seed=workload.seed)
        batches = [[index for _, index in batch] for batch in sampler]
        return DataLoader(
            Subset(dataset, positions),
            batch_sampler=batches,
            collate_fn=reference.collate,
            num_workers=workload.workers or 0,
        )

    def result(self):
        """{"seconds" from the imports' end to the first batch, "host_mb" at most, "imports_mb" of it before that}."""
        return {"seconds": self.seconds, **peak_memory_mb(torch.device("cpu")), **self.imported}

    def watch_workers(self, num_batches, looks=5):
        """Go through batches and, `looks` times, read each worker's unique memory: {"batches", "unique_mb": [[…]]}."""
        at = [max(1, round(num_batches * (n + 1) / looks)) for n in range(looks)]
        seen = {"batches": [], "unique_mb": []}
        for number in range(1, num_batches + 1):
            if next(self.batches, None) is None:
                break
            if number in at:
                seen["batches"].append(number)
                workers = sorted(process.pid for process in multiprocessing.active_children())
                seen["unique_mb"].append([unique_memory_mb(pid) for pid in workers])
        return seen


# --- the conversation ----------------------------------------------------------------------------------------


class WeightsArm:
    """Writes the weights of the others; see benchmark_models.write_weights."""

    def __init__(self, arm, workload, **settings):
        write_weights(workload, **settings)


KINDS = {
    "weights": WeightsArm,
    "train": trainer,
    "ceiling": CeilingArm,
    "eval": Evaluator,
    "after": AfterForward,
    "data": DataArm,
    "startup": StartupArm,
    "accuracy": TorchvisionRun,
}


def start(kind, arm, workload, **settings):
    timed_alike = kind in ("ceiling", "accuracy")
    if VARIANTS[arm].get("keep_memory", True) if arm in VARIANTS else timed_alike:
        utils.keep_freed_memory()  # as train.py does; the others, where they are timed, have their users' allocator
    return KINDS[kind](arm=arm, workload=Workload(**workload), **settings)


def answer(work):
    """What `work` returns, or how it failed, as one JSON-able object."""
    try:
        return {"result": work()}
    except ModuleNotFoundError as error:
        return {"unavailable": f"not installed ({error.name})"}
    except UserError as error:
        return {"mistake": str(error)}
    except Exception:  # whatever it is, the other arms go on
        return {"failed": traceback.format_exc()}


def serve(requests, answers):
    """Answer requests, lines of JSON, until there are no more."""
    arm = None

    def begin(**arguments):
        nonlocal arm
        arm = start(**arguments)

    for line in requests:
        request = json.loads(line)
        method = begin if request["call"] == "start" else getattr(arm, request["call"])
        answers.write(json.dumps(answer(functools.partial(method, **request["arguments"]))) + "\n")
        answers.flush()


if __name__ == "__main__":
    # Libraries print; only answers may go to the pipe.
    with os.fdopen(os.dup(1), "w") as pipe:
        os.dup2(2, 1)
        serve(sys.stdin, pipe)
