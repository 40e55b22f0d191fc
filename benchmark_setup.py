"""What every benchmark prepares: images, the workload of its arms, the weights they start from, the opponents."""

import benchmark_fake_data
import coco_utils
from benchmark_processes import Arm
from utils import UserError


def data_set(args, folder, num_images):
    """(image folder, annotation file) of --data-path, or of so many made-up images in the folder."""
    root = args.data_path
    if root is None:
        root = benchmark_fake_data.write_fake_coco(folder / "fake", num_images, seed=args.seed)
    return coco_utils.dataset_paths(root)["train"]


def workload(args, data, **changes):
    """benchmark_arms.Workload as a dict."""
    images, annotations = data
    names = ("model", "backbone", "min_size", "max_size", "threads", "seed", "device")
    common = {name: getattr(args, name) for name in names}
    return {"images": str(images), "annotations": str(annotations), **common, **changes}


def write_weights(args, work, path, **settings):
    """Have the starting weights of all arms written; returns the workload that names them."""
    arm = Arm("weights")
    try:
        arm.start("weights", {**work, "device": "cpu"}, path=str(path), **settings)
    finally:
        arm.close()
    return {**work, "weights": str(path)}


def chosen_arms(args, known):
    """The names in --arms, [] without; UserError for one that is not known."""
    names = args.arms.split(",") if args.arms else []
    for name in names:
        if name not in known:
            raise UserError(f"--arms {name}: choose from {', '.join(known)}")
    return names


def opponents(args, known):
    """The names in --against that this command can measure; the others are refused."""
    wanted = [name for name in (args.against or "").split(",") if name]
    for name in wanted:
        if name not in known:
            raise UserError(f"--against {name}: {args.benchmark} knows {', '.join(known)}")
    return wanted
