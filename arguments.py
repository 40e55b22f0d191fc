"""The command line of train.py: its flags by group, recipes read as files of flags, contradictions refused."""

import argparse
import shlex
import sys
from pathlib import Path

import coco_eval
import compilation
import models
import optim

SHAPES_RECIPE = Path(__file__).parent / "recipes" / "shapes.args"
FAKE_STEPS = 100  # with --use-fake-data, where nothing else is said


class ArgumentParser(argparse.ArgumentParser):
    """Reads `@FILE` as arguments, as many a line as one likes, with # comments; says what is wrong in one line."""

    def convert_arg_line_to_args(self, arg_line):
        return shlex.split(arg_line, comments=True)

    def error(self, message):
        self.exit(2, f"error: {message}; {self.prog} --help lists the flags\n")


def get_parser(description):
    parser = ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        fromfile_prefix_chars="@",
        epilog="A recipe is a file of arguments: python3 train.py @recipes/shapes.args --epochs 2",
    )

    data = parser.add_argument_group("data")
    data.add_argument(
        "--data-path", help="folder with train2017/, val2017/ and annotations/; none: built-in shapes"
    )
    data.add_argument(
        "--dataset", choices=["shapes", "coco", "coco_kp"], help="default: coco with --data-path, else shapes"
    )
    data.add_argument("--train-images", help="folder of training images, for any COCO-format data set")
    data.add_argument(
        "--train-annotations", help="COCO json of the training images; classes are read from it"
    )
    data.add_argument("--val-images", help="folder of validation images")
    data.add_argument("--val-annotations", help="COCO json of the validation images")
    data.add_argument("--keep-empty", action="store_true", help="train on images without objects too")
    data.add_argument(
        "--skip-broken", action="store_true",
        help="train on the next image in place of one that cannot be decoded, instead of ending with its name",
    )  # fmt: skip
    data.add_argument("--train-samples", type=int, help="train on a fixed random subset of so many images")
    data.add_argument(
        "--use-fake-data", action="store_true",
        help="made-up batches from memory, to measure a step without the loader; trains only, saves nothing",
    )  # fmt: skip
    data.add_argument(
        "--data-augmentation", default="hflip", choices=["none", "hflip", "multiscale", "lsj", "ssd", "ssdlite"],
        help="augmentation policy (default: hflip)",
    )  # fmt: skip
    data.add_argument(
        "--use-copypaste", action="store_true", help="simple copy-paste augmentation; with lsj only"
    )
    data.add_argument(
        "--aspect-ratio-group-factor", type=int, default=3,
        help="batch images of like aspect ratio, in bins 2^(1/k) wide; -1: any together (default: 3)",
    )  # fmt: skip
    data.add_argument(
        "-j", "--workers", type=int, help="loader processes a rank (default: 4 with a GPU, else 1)"
    )

    model = parser.add_argument_group("model")
    model.add_argument("--model", default="maskrcnn_resnet50_fpn", help="a torchvision detection builder")
    model.add_argument(
        "--backbone", help="another torchvision classifier under the FPN, e.g. resnet18, swin_t"
    )
    model.add_argument(
        "--weights", help="detector weights: a torchvision enum's name or a file (see weights.py)"
    )
    model.add_argument("--weights-backbone", help="backbone weights: likewise")
    model.add_argument(
        "--trainable-backbone-layers", type=int, help="backbone stages that train, from the last"
    )
    model.add_argument(
        "--norm", choices=models.NORMS, help="backbone norm (default: frozen if pretrained, else batch)"
    )
    model.add_argument(
        "--norm-eps", type=float, help="epsilon of the backbone norm (default: as the weights want)"
    )
    model.add_argument(
        "--sync-bn", action="store_true", help="batch norm over all ranks: same as --norm sync"
    )
    model.add_argument(
        "--min-size", type=int, nargs="+", help="shorter side in pixels after resizing (default: 800)"
    )
    model.add_argument("--max-size", type=int, help="longest side in pixels after resizing (default: 1333)")
    model.add_argument("--rpn-score-thresh", type=float, help="drop proposals scored below this")
    model.add_argument(
        "--detections-per-image", type=int, help="most detections an image (default: the model's)"
    )
    model.add_argument("--rois-per-image", type=int, help="RoIs an image that train the heads (default: 512)")
    model.add_argument(
        "--reference-ops", action="store_true", help="torchvision's own modules instead of the fast ones"
    )

    opt = parser.add_argument_group("optimisation")
    opt.add_argument("-b", "--batch-size", type=int, default=2, help="images a rank a batch (default: 2)")
    opt.add_argument(
        "--accum-steps", type=int, default=1, help="batches a step: accumulate gradients (default: 1)"
    )
    opt.add_argument("--opt", default="sgd", choices=sorted(optim.BASE_LR), help="optimizer (default: sgd)")
    opt.add_argument(
        "--lr", type=float,
        help="learning rate (default: 0.02 for each 16 images a step, 0.0001 for adamw)",
    )  # fmt: skip
    opt.add_argument("--momentum", type=float, default=0.9, help="of SGD (default: 0.9)")
    opt.add_argument(
        "--wd", "--weight-decay", dest="weight_decay", type=float, default=1e-4, help="default: 1e-4"
    )
    opt.add_argument("--norm-weight-decay", type=float, help="weight decay of norm layers (default: as --wd)")
    opt.add_argument(
        "--clip-grad-norm", type=float, default=0.0, help="largest gradient norm; 0: any (default: 0)"
    )
    opt.add_argument(
        "--ema-decay", type=float, default=0.0, help="evaluate an average of the weights; 0: off"
    )

    schedule = parser.add_argument_group("schedule")
    schedule.add_argument(
        "--epochs", type=int, help="passes over the data (default: 26, or what --total-steps needs)"
    )
    schedule.add_argument("--total-steps", type=int, help="stop after so many optimizer steps")
    schedule.add_argument(
        "--lr-scheduler", default="multisteplr", choices=["multisteplr", "cosineannealinglr"]
    )
    schedule.add_argument(
        "--lr-steps", type=int, nargs="+",
        help="epochs (with --total-steps: steps) at which the rate falls (default: at 16/26 and 22/26 of the run)",
    )  # fmt: skip
    schedule.add_argument("--lr-step-size", type=int, help="instead: let the rate fall every so many epochs")
    schedule.add_argument("--lr-gamma", type=float, default=0.1, help="the factor it falls by (default: 0.1)")
    schedule.add_argument(
        "--warmup-steps", type=int, help="linear warm-up (default: 1000, at most a tenth of the run)"
    )
    schedule.add_argument(
        "--warmup-factor", type=float, default=1e-3, help="the warm-up starts at this share"
    )
    schedule.add_argument(
        "--start-epoch", "--start_epoch", type=int, default=0, help="number of the first epoch"
    )

    speed = parser.add_argument_group("precision and speed")
    speed.add_argument("--device", help="cuda, cuda:1 or cpu (default: a GPU where there is one)")
    speed.add_argument("--amp", action="store_true", help="mixed precision")
    speed.add_argument("--amp-dtype", default="auto", choices=["auto", "bf16", "fp16"], help="default: auto")
    speed.add_argument(
        "--channels-last", action=argparse.BooleanOptionalAction, default=True,
        help="keep weights and features in channels-last order (default: on)",
    )  # fmt: skip
    speed.add_argument(
        "--compile", nargs="?", const="default", choices=compilation.MODES,
        help="torch.compile backbone and RPN head, batches padded to few shapes (alone: default)",
    )  # fmt: skip
    speed.add_argument(
        "--profile",
        action="store_true",
        help="say where a step's time goes, and leave a trace of a few steps",
    )
    speed.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    speed.add_argument(
        "--use-deterministic-algorithms", action="store_true", help="only deterministic operations, slower"
    )

    evaluation = parser.add_argument_group("evaluation")
    evaluation.add_argument("--mode", default="train_and_eval", choices=["train", "train_and_eval", "eval"])
    evaluation.add_argument("--test-only", action="store_true", help="same as --mode eval")
    evaluation.add_argument(
        "--eval-every", type=int, default=1, help="epochs between evaluations (default: 1)"
    )
    evaluation.add_argument(
        "--eval-samples", type=int, help="evaluate a fixed random subset of so many images"
    )
    evaluation.add_argument(
        "--eval-batch-size", type=int, default=1, help="images a rank a batch (default: 1)"
    )
    evaluation.add_argument(
        "--async-eval", action="store_true",
        help="evaluate beside the next epoch, in a process of its own; same numbers, logged when they are there",
    )  # fmt: skip
    evaluation.add_argument(
        "--evaluator", default="hotcoco", choices=coco_eval.EVALUATORS, help="default: hotcoco"
    )
    evaluation.add_argument(
        "--val-loss", action="store_true", help="measure the training losses on the val set too"
    )

    distributed = parser.add_argument_group("distributed")
    distributed.add_argument("--world-size", type=int, default=1, help="ranks; torchrun sets it")
    distributed.add_argument("--dist-url", default="env://", help="where ranks meet (default: env://)")

    output = parser.add_argument_group("output")
    output.add_argument("--output-dir", help="what the run leaves (default: a new folder in runs/)")
    output.add_argument("--overwrite", action="store_true", help="start anew in a folder that holds a run")
    output.add_argument(
        "--resume", default="", help="a checkpoint to go on from, or auto: the newest in --output-dir"
    )
    output.add_argument(
        "--keep-checkpoints", type=int, default=2, help="model_<epoch>.pth files kept (default: 2)"
    )
    output.add_argument(
        "--print-freq", type=int, default=20, help="steps between progress lines (default: 20)"
    )
    return parser


def parse_args(description, argv=None):
    """Arguments as given, after the shapes recipe's where the built-in data set is meant."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = get_parser(description)
    args = parser.parse_args(argv)
    if args.dataset is None:
        args.dataset = (
            "coco"
            if args.data_path or args.train_annotations or args.val_annotations or args.use_fake_data
            else "shapes"
        )
    if args.dataset == "shapes":
        given = args
        args = parser.parse_args([f"@{SHAPES_RECIPE}", *argv])
        args.dataset = given.dataset
        if "resnet50" not in args.model:  # the recipe's small backbone is for the builders of a ResNet-50
            args.backbone = given.backbone
    check_args(parser, args)
    return args


def check_args(parser, args):
    """Where contradictions meet; also resolves the flags that are other flags' short forms."""
    if args.test_only:
        args.mode = "eval"
    if args.use_fake_data:
        if args.mode == "eval" or args.resume:
            parser.error("--use-fake-data measures training steps: it evaluates nothing and resumes nothing")
        if args.use_copypaste:
            parser.error("--use-fake-data has no augmentation; leave out --use-copypaste")
        args.mode = "train"
        if args.epochs is None and args.total_steps is None:
            args.total_steps = FAKE_STEPS
    if args.sync_bn:
        if args.norm not in (None, "sync"):
            parser.error(f"--sync-bn contradicts --norm {args.norm}")
        args.norm = "sync"
    if args.mode == "eval" and not args.resume and not args.weights:
        parser.error("--test-only needs weights: --resume CHECKPOINT or --weights NAME")
    for name in (
        "batch_size",
        "eval_batch_size",
        "accum_steps",
        "eval_every",
        "print_freq",
        "keep_checkpoints",
    ):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    for name in ("epochs", "total_steps", "eval_samples", "train_samples"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.lr_steps and args.lr_step_size:
        parser.error("--lr-steps and --lr-step-size contradict each other")
    if args.lr is not None and args.lr <= 0:
        parser.error("--lr must be positive")
    if not 0 <= args.ema_decay < 1:
        parser.error("--ema-decay must lie in [0, 1)")
    if args.use_copypaste and args.data_augmentation != "lsj":
        parser.error("--use-copypaste needs --data-augmentation lsj")
    if args.use_copypaste and "maskrcnn" not in args.model:
        parser.error("--use-copypaste needs masks: a maskrcnn model")
    if (args.train_annotations is None) != (args.train_images is None):
        parser.error("--train-annotations and --train-images go together")
    if (args.val_annotations is None) != (args.val_images is None):
        parser.error("--val-annotations and --val-images go together")
    if args.resume == "auto" and args.output_dir is None:
        parser.error("--resume auto needs --output-dir")
