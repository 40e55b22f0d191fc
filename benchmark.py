"""Speed and accuracy, measured: our way and others' in one run on the same images.

python3 benchmark.py train --data-path DIR --against torchvision,detectron2     a training step, its parts, its ceiling
python3 benchmark.py eval --data-path DIR --against torchvision                 forward passes, and what follows them
python3 benchmark.py data --data-path DIR --against torchvision                 samples and batches, on one core
python3 benchmark.py startup --data-path DIR --against torchvision              the first batch at COCO's size
python3 benchmark.py gpu --json FILE                                            all that needs a GPU, in ten minutes
python3 benchmark.py accuracy --against torchvision --json FILE                 the AP that whole trainings reach

Every arm is a process of its own. Where time is measured they work one after another, a short turn each, round after
round, so that what else the machine does hits all alike; compare within a run, never across. --use-fake-data needs no
data set. accuracy without --data-path takes the built-in shapes; with the --json of an interrupted one it goes on.
"""

import argparse
import shlex
import signal
import sys
import tempfile
from pathlib import Path

import arguments
import benchmark_fake_data
import utils
from benchmark_accuracy import ACCURACY_ARMS, run_accuracy
from benchmark_data import run_data
from benchmark_eval import run_eval
from benchmark_gpu import run_gpu
from benchmark_processes import ArmError
from benchmark_report import Report
from benchmark_startup import run_startup
from benchmark_train import TRAIN_ARMS, run_train
from utils import UserError

COMMANDS = {
    "train": run_train,
    "eval": run_eval,
    "data": run_data,
    "startup": run_startup,
    "gpu": run_gpu,
    "accuracy": run_accuracy,
}


def parse_args(argv=None):
    description, _, epilog = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="benchmark", required=True)
    every = argparse.ArgumentParser(add_help=False)
    every.add_argument("--data-path", help="folder in COCO 2017's layout; its train part is measured on")
    every.add_argument("--against", help="comma-separated opponents: torchvision, for train also detectron2")
    every.add_argument("--device", help="cuda or cpu (default: a GPU where there is one)")
    every.add_argument(
        "--threads", type=int, default=utils.available_cpus(), help="of each arm (default: all)"
    )
    every.add_argument("--json", metavar="FILE", help="keep everything there, written as it is found")
    every.add_argument("--markdown", action="store_true", help="print the tables as BENCHMARKS.md has them")

    common = argparse.ArgumentParser(add_help=False, parents=[every])
    common.add_argument(
        "--use-fake-data",
        action="store_true",
        help="made-up images of COCO's shapes instead",
    )
    common.add_argument("--model", default="maskrcnn_resnet50_fpn", help="a torchvision detection builder")
    common.add_argument("--backbone", help="another torchvision classifier under the FPN")
    common.add_argument("--min-size", type=int, default=800, help="pixels (default: 800)")
    common.add_argument("--max-size", type=int, default=1333, help="pixels (default: 1333)")
    common.add_argument(
        "--seed", type=int, default=0, help="of weights, batches and made-up data (default: 0)"
    )

    train = commands.add_parser("train", parents=[common], help="one training step")
    train.add_argument("-b", "--batch-size", type=int, default=2, help="images a step (default: 2)")
    train.add_argument("--steps", type=int, default=1, help="steps a turn (default: 1)")
    train.add_argument("--arms", help=f"exactly these, comma-separated, instead: {', '.join(TRAIN_ARMS)}")
    train.add_argument(
        "--with-loader", action="store_true", help="batches from a real loader, not from memory"
    )
    train.add_argument("--workers", type=int, default=1, help="of that loader (default: 1)")

    evaluate = commands.add_parser("eval", parents=[common], help="evaluation")
    evaluate.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4], help="default: 1 4")
    evaluate.add_argument("--steps", type=int, default=2, help="batches a turn (default: 2)")
    evaluate.add_argument(
        "--detections-images", type=int, default=200,
        help="images of 100 made-up detections to paste, encode and score; 0: none (default: 200)",
    )  # fmt: skip

    for command in (train, evaluate):
        command.add_argument(
            "--warmup", type=int, default=1, help="turns' worth of steps before (default: 1)"
        )
        command.add_argument(
            "--num-batches", type=int, default=8,
            help="different batches, gone through again and again; eval: 0 for no forward passes (default: 8)",
        )  # fmt: skip
        command.add_argument("--breakdown-steps", type=int, default=2, help="for the parts (default: 2)")
        command.add_argument("--checkpoint", help="its weights instead of random ones; eval scores them too")

    data = commands.add_parser("data", parents=[common], help="samples and batches on one core")
    data.add_argument("-b", "--batch-size", type=int, default=2, help="images a batch (default: 2)")
    data.add_argument("--images", type=int, default=64, help="images a turn (default: 64)")

    startup = commands.add_parser("startup", parents=[common], help="the first batch at COCO's size")
    startup.add_argument("-b", "--batch-size", type=int, default=2, help="images a batch (default: 2)")
    startup.add_argument(
        "--images", type=int, default=benchmark_fake_data.FULL_SIZE, help="of the set (default: %(default)s)"
    )
    startup.add_argument("--workers", type=int, default=4, help="whose memory is watched (default: 4)")
    startup.add_argument("--watch-batches", type=int, default=2000, help="so long; 0: not (default: 2000)")

    for command, rounds in ((train, 5), (evaluate, 5), (data, 5), (startup, 3)):
        command.add_argument("--rounds", type=int, default=rounds, help=f"default: {rounds}")

    gpu = commands.add_parser("gpu", parents=[common], help="the GPU protocol")
    gpu.add_argument("--budget-seconds", type=float, default=540, help="to be done in (default: 540)")
    gpu.add_argument("--cases", help="exactly these, comma-separated, by the names in the report")
    gpu.add_argument("--workers", type=int, default=12, help="of the loader case (default: 12)")
    gpu.add_argument(
        "--smoke", action="store_true", help="the small form: tiny model and images, single steps"
    )

    accuracy = commands.add_parser("accuracy", parents=[every], help="the AP that whole trainings reach")
    accuracy.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="a run of each arm for each (default: 0 1 2)"
    )
    accuracy.add_argument(
        "--arms", help=f"exactly these, comma-separated, instead: {', '.join(ACCURACY_ARMS)}"
    )
    accuracy.add_argument("--total-steps", type=int, default=720, help="of each run (default: 720)")
    accuracy.add_argument(
        "--recipe",
        default=str(arguments.SHAPES_RECIPE),
        help="a file of train.py's flags (default: the shapes')",
    )

    args = parser.parse_args(argv)
    if args.benchmark == "accuracy":
        return args
    if args.data_path and args.use_fake_data:
        parser.error("--data-path and --use-fake-data contradict each other")
    if not args.data_path and not args.use_fake_data and args.benchmark != "gpu":
        parser.error("what to measure on? --data-path DIR, or --use-fake-data")
    return args


def main(argv=None):
    """Run one benchmark. Returns the exit status: 0, 1 if an arm failed, 2 after a user's mistake."""
    args = parse_args(argv)
    try:
        args.device = str(utils.select_device(args.device))
        command = "python3 benchmark.py " + shlex.join(sys.argv[1:] if argv is None else argv)
        report = Report(args, command)
        with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
            COMMANDS[args.benchmark](args, report, Path(folder))
        return report.finish()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ArmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of the blocks that end the arms
    sys.exit(main())
