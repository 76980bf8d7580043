"""``clipdeploy verify``: judge artifacts against PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clipdeploy.cli.common import (
    EXIT_VERIFICATION,
    Context,
    DefaultCommand,
    DefaultGroup,
    emit,
    stage_command,
)
from clipdeploy.cli.labelling import check_labelling, labelling, labelling_options
from clipdeploy.cli.numbers import number
from clipdeploy.cli.options import option
from clipdeploy.cli.params import ArtifactPath, setting_option
from clipdeploy.cli.shared_options import (
    batch_option,
    cluster_or_none,
    force_option,
    model_option,
    ray_option,
    shard_option,
    shard_or_none,
    skip_unreadable_option,
    threads_option,
    trust_option,
    val_data_option,
    val_images_option,
)
from clipdeploy.cli.usage import given_options, group, refuse_together, refuse_unused, with_options
from clipdeploy.core.errors import UsageError
from clipdeploy.core.spans import CACHE_GB, DROP, WORKERS

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from clipdeploy.stages.verify.setup import Judgement, VerifyScope
    from clipdeploy.verification.verifier import VerifyConfig

max_drop_option = setting_option(
    "max_drop",
    "--max-drop",
    type=number(DROP),
    metavar="POINTS",
    help="Percentage points of top-1 that an artifact may lose.",
)
max_drop_top5_option = option(
    "--max-top5-drop",
    "max_drop_top5",
    type=number(DROP),
    metavar="POINTS",
    help="Percentage points of top-5 that an artifact may lose.",
    default_text="top-5 is not judged",
)
baseline_option = option(
    "--baseline",
    default="card",
    metavar="card|none|TOP1[,TOP5]",
    help="Accuracy in percent that PyTorch must reach first: the published one, none, or numbers.",
)
report_option = option(
    "--output",
    "-o",
    "reports",
    type=click.Path(path_type=Path, dir_okay=False),
    multiple=True,
    formerly={"--report": "--output"},
    help="Write a report into this .html, .md or .json file; may be given several times.",
)
_OPTIONS = (
    model_option,
    val_data_option("Labelled images: a folder, zip or tar; see --layout."),
    max_drop_option,
    max_drop_top5_option,
    val_images_option(
        "Number of images to judge on, spread over the classes.",
        "all",
        formerly={"--limit": "--images"},
    ),
    option("--sequential", is_flag=True, help="Stop as soon as all verdicts are known."),
    option("--graphs-only", is_flag=True, help="Judge the ONNX graphs and leave out the engines."),
    baseline_option,
    option(
        "--allow-leak",
        is_flag=True,
        help="Accept calibration images among --data and count them, instead of refusing them.",
    ),
    labelling_options(),
    batch_option("clipdeploy.verification.verifier.VerifyConfig"),
    option(
        "--workers",
        type=number(WORKERS),
        metavar="COUNT",
        help="Processes that decode images; with 0, this process does.",
        default_text="one for each core",
    ),
    setting_option(
        "cache_crops",
        "--cache-crops/--no-cache-crops",
        formerly={"--cache": "--cache-crops", "--no-cache": "--no-cache-crops"},
        help="Cache decoded crops and PyTorch's logits for the next run.",
    ),
    setting_option(
        "cache_size",
        "--cache-size",
        type=number(CACHE_GB),
        metavar="GB",
        help="Maximum size of the crop cache in GB; with 0, nothing is cached.",
        default_text="34",
    ),
    report_option,
    shard_option("verify merge"),
    ray_option,
    threads_option,
    skip_unreadable_option,
    trust_option,
    force_option,
)


def _options(command: Callable[..., Any]) -> Callable[..., Any]:
    return with_options(_OPTIONS, command)


def _artifact_or_merge(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    # The group passes all words that are not subcommands on to `run`, also incomplete ones.
    if incomplete and not ctx.params.get("artifacts") and "merge".startswith(incomplete):
        return [CompletionItem("merge")]
    return param.type.shell_complete(ctx, param, incomplete)


@group(cls=DefaultGroup, default="run")
def verify() -> None:
    """Judge artifacts against PyTorch; `verify texts` a text tower; `verify merge` joins shards."""


@verify.command(
    cls=DefaultCommand,
    epilog="\b\n"
    "clipdeploy verify --data IMAGENET_VAL -o verdict.html\n"
    "clipdeploy verify model.int8.onnx --data IMAGENET_VAL --sequential",
)
@click.argument("artifacts", nargs=-1, type=ArtifactPath(), shell_complete=_artifact_or_merge)
@_options
@stage_command
def run(
    context: Context, artifacts: tuple[Path, ...], model: str | None, val_data: Path, **options: Any
) -> int:
    """Judge the ARTIFACTS, or all graphs and engines of the model, against PyTorch.

    The exit code is 3 unless all of them are proven to keep their accuracy. To continue an
    interrupted run, give the same command again. `clipdeploy verify merge` joins shards.
    """
    _check_used(artifacts, options)
    config, reports = _config(options), options["reports"]
    _check_reports(reports, config.shard)
    if config.shard and (later := given_options(("max_drop", "max_drop_top5", "baseline"))):
        context.note(f"a shard has no verdict: give {', '.join(later)} to `verify merge` as well")
    name = context.model(model)
    from clipdeploy.stages.verify.run import verify_model

    result = verify_model(
        context.workspace,
        name,
        val_data,
        config,
        verify_scope(artifacts, options),
        cluster=cluster_or_none(options["ray"]),
        force=options["force"],
        note=context.note,
        progress=context.progress,
    )
    return _show(context, result, reports, val_data)


@verify.command(
    epilog="\b\nclipdeploy verify texts texts.txt",
)
@click.argument("texts", type=click.Path(path_type=Path))
@click.argument("artifacts", nargs=-1, type=ArtifactPath())
@model_option
@max_drop_option
@option("--graphs-only", is_flag=True, help="Judge the ONNX graphs and leave out the engines.")
@batch_option("clipdeploy.verification.verifier.VerifyConfig")
@report_option
@threads_option
@trust_option
@force_option
@stage_command
def texts(
    context: Context,
    texts: Path,
    artifacts: tuple[Path, ...],
    model: str | None,
    reports: tuple[Path, ...],
    graphs_only: bool,
    force: bool,
    **options: Any,
) -> int:
    """Judge the text tower of an embedding model on TEXTS, a file with one text a line.

    The exit code is 3 unless all ARTIFACTS, or all graphs and engines of the text tower, are proven
    to find PyTorch's nearest neighbours among the texts.
    """
    _check_reports(reports, None)
    name = context.model(model)
    from clipdeploy.stages.verify.setup import VerifyScope
    from clipdeploy.stages.verify.texts import verify_texts
    from clipdeploy.verification.verifier import VerifyConfig

    result = verify_texts(
        context.workspace,
        name,
        texts,
        VerifyConfig(**options),
        VerifyScope(artifacts=artifacts, graphs_only=graphs_only),
        force=force,
        note=context.note,
        progress=context.progress,
    )
    return _show(context, result, reports, None)


@verify.command()
@click.argument("shards", nargs=-1, type=click.Path(path_type=Path))
@model_option
@max_drop_option
@max_drop_top5_option
@baseline_option
@report_option
@option(
    "--data",
    "--val-data",
    "val_data",
    type=click.Path(path_type=Path),
    help="The images of the shards; they are compared with the records.",
    default_text="where the first shard found them",
)
@labelling_options()
@stage_command
def merge(
    context: Context,
    shards: tuple[Path, ...],
    model: str | None,
    max_drop: float,
    max_drop_top5: float | None,
    baseline: str,
    reports: tuple[Path, ...],
    val_data: Path | None,
    **options: Any,
) -> int:
    """Join the shards of `verify --shard` into one verdict.

    Takes the given files, or all shards of the workspace, and removes them once they are joined.
    Artifacts and images must be the files that the shards judged.
    """
    check_labelling(options)
    _check_reports(reports, None)
    name = context.model(model)
    from clipdeploy.stages.verify.merge import merge_verification
    from clipdeploy.stages.verify.setup import VerifyScope
    from clipdeploy.verification.baseline import Expected
    from clipdeploy.verification.verdicts import Limits

    scope = VerifyScope(labelling=labelling(options), expected=Expected.parse(baseline))
    result = merge_verification(
        context.workspace,
        name,
        Limits(max_drop, max_drop_top5),
        scope,
        shards,
        data=val_data,
        note=context.note,
        progress=context.progress,
    )
    return _show(context, result, reports, val_data)


def _check_used(artifacts: tuple[Path, ...], options: dict[str, Any]) -> None:
    """Refuse options that this run would not use.

    Raises:
        UsageError: it names the first one.
    """
    if any(path.suffix == ".engine" for path in artifacts):
        hint = "leave it out, or name only graphs"
        refuse_together("artifacts", "graphs_only", hint=hint)
    if not options["cache_crops"]:
        refuse_unused(["cache_size"], "--cache-crops", "pass --cache-crops")
    if options["graphs_only"] or (artifacts and all(path.suffix == ".onnx" for path in artifacts)):
        refuse_unused(["trust"], "engines", "name an .engine file")
    check_labelling(options)


def _check_reports(reports: tuple[Path, ...], shard: tuple[int, int] | None) -> None:
    if reports and shard:
        raise UsageError("a shard has no verdict to report", hint="pass --output to `verify merge`")
    if reports:
        from clipdeploy.verification.reports import check_report_paths

        check_report_paths(reports)


def _config(options: dict[str, Any]) -> VerifyConfig:
    from clipdeploy.imaging import CropCache
    from clipdeploy.verification.verifier import VerifyConfig

    size = options["cache_size"]
    cache = CropCache.default() if size is None else CropCache.default(int(size * 1e9))
    return VerifyConfig(
        max_drop=options["max_drop"],
        max_drop_top5=options["max_drop_top5"],
        batch=options["batch"],
        skip_unreadable=options["skip_unreadable"],
        workers=options["workers"],
        cache=cache if options["cache_crops"] else None,
        shard=shard_or_none(options["shard"]),
        sequential=options["sequential"],
        trust=options["trust"],
        threads=options["threads"],
    )


def verify_scope(artifacts: tuple[Path, ...], options: dict[str, Any]) -> VerifyScope:
    """The options that choose artifacts and images, as a configuration."""
    from clipdeploy.stages.verify.setup import VerifyScope
    from clipdeploy.verification.baseline import Expected

    return VerifyScope(
        artifacts=artifacts,
        graphs_only=options["graphs_only"],
        limit=options["val_images"],
        labelling=labelling(options),
        allow_leak=options["allow_leak"],
        expected=Expected.parse(options["baseline"]),
    )


def _show(context: Context, result: Judgement, reports: tuple[Path, ...], data: Path | None) -> int:
    verification = result.verification
    if verification is None:
        emit(context, {"results": str(result.results)}, lambda: f"{result.results}")
        return 0
    for skipped in verification.skipped:
        context.note(f"skipped, unreadable: {skipped}")
    if reports:
        # Before the result is printed, because its reader may have closed the pipe after that.
        from clipdeploy.stages.report import write_reports

        found = context.workspace.bisection(verification.model)
        write_reports(result, reports, data=data, bisection=found)
    emit(context, verification, lambda: verification)
    if result.disagreements is not None and any(row.disagreements for row in verification.rows):
        context.note(f"images on which an artifact disagrees with PyTorch: {result.disagreements}")
    for path in reports:
        context.note(f"report: {path}")
    if any(row.kind == "engine" and row.verdict == "not executed" for row in verification.rows):
        context.note("engines were not executed here; --graphs-only judges only the graphs")
    return 0 if verification else EXIT_VERIFICATION
