import pytest

import arguments


def parse(*flags):
    return arguments.parse_args("", list(flags))


def refused(capsys, *flags):
    """The line that a contradiction prints; the exit status is 2."""
    with pytest.raises(SystemExit) as stop:
        parse(*flags)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_without_arguments_the_shapes_recipe_is_read():
    args = parse()
    assert (args.dataset, args.backbone, args.opt, args.amp) == ("shapes", "resnet18", "adamw", True)


def test_flags_override_the_recipe():
    args = parse("--total-steps", "7", "--opt", "sgd")
    assert (args.dataset, args.total_steps, args.opt, args.backbone) == ("shapes", 7, "sgd", "resnet18")


def test_a_data_path_means_coco_and_torchvisions_defaults():
    args = parse("--data-path", "somewhere")
    assert (args.dataset, args.model, args.batch_size) == ("coco", "maskrcnn_resnet50_fpn", 2)
    assert (args.momentum, args.weight_decay, args.lr, args.backbone) == (0.9, 1e-4, None, None)


def test_the_references_command_runs_unchanged():
    args = parse(
        "--data-path", "x", "--dataset", "coco", "--model", "retinanet_resnet50_fpn", "--epochs", "26",
        "--lr-steps", "16", "22", "--aspect-ratio-group-factor", "3", "--lr", "0.01", "-b", "4", "-j", "2",
        "--weights-backbone", "ResNet50_Weights.IMAGENET1K_V1", "--start_epoch", "1",
        "--trainable-backbone-layers", "3",
    )  # fmt: skip
    assert (args.lr_steps, args.batch_size, args.workers, args.start_epoch) == ([16, 22], 4, 2, 1)


def test_recipes_hold_several_flags_a_line_and_comments(tmp_path):
    recipe = tmp_path / "r.args"
    recipe.write_text("# a comment\n--data-path 'a b'  # another\n--lr 0.5 --epochs 3\n\n")
    args = parse(f"@{recipe}", "--epochs", "4")
    assert (args.data_path, args.lr, args.epochs) == ("a b", 0.5, 4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--test-only"], "--test-only needs weights"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--total-steps", "0"], "--total-steps must be at least 1"),
        (["--lr", "-1"], "--lr must be positive"),
        (["--ema-decay", "1"], r"--ema-decay must lie in [0, 1)"),
        (["--sync-bn", "--norm", "frozen"], "--sync-bn contradicts --norm frozen"),
        (["--lr-steps", "3", "--lr-step-size", "2"], "contradict"),
        (["--use-copypaste"], "needs --data-augmentation lsj"),
        (["--train-annotations", "a.json"], "go together"),
        (["--val-images", "a"], "go together"),
        (["--resume", "auto"], "--resume auto needs --output-dir"),
        (["--use-fake-data", "--test-only", "--resume", "x"], "it evaluates nothing and resumes nothing"),
        (["--use-fake-data", "--resume", "x"], "it evaluates nothing and resumes nothing"),
        (["--use-fake-data", "--data-augmentation", "lsj", "--use-copypaste"], "leave out --use-copypaste"),
        (["--no-such-flag"], "unrecognized arguments"),
    ],
)
def test_contradictions_are_one_line(capsys, flags, message):
    line = refused(capsys, *flags)
    assert message in line
    assert line.startswith("error: ") and line.count("\n") == 1


def test_short_forms_are_resolved():
    assert parse("--test-only", "--resume", "x.pth").mode == "eval"
    assert parse("--sync-bn").norm == "sync"


def test_fake_data_means_cocos_sizes_and_a_hundred_steps_of_training_alone():
    args = parse("--use-fake-data")
    assert (args.dataset, args.mode, args.total_steps, args.backbone) == ("coco", "train", 100, None)
    assert parse("--use-fake-data", "--epochs", "2").total_steps is None
