"""``clipdeploy verify``: the verdict."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clipdeploy.cli.common import (
    EXIT_VERIFICATION,
    Context,
    DefaultGroup,
    cluster_or_none,
    data_option,
    emit,
    force_option,
    model_option,
    ray_option,
    shard_option,
    shard_or_none,
    skip_unreadable_option,
    stage_command,
    threads_option,
    trust_option,
)
from clipdeploy.cli.labelling import check_labelling, labelling, labelling_options
from clipdeploy.cli.numbers import number
from clipdeploy.cli.params import ArtifactPath, setting_option
from clipdeploy.cli.usage import given_options, group, refuse_together, refuse_unused, with_options
from clipdeploy.core.errors import UsageError
from clipdeploy.core.spans import BATCH, CACHE_GB, DROP, IMAGES, WORKERS

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from clipdeploy.stages.verify.setup import Judgement, VerifyScope
    from clipdeploy.verification.verifier import VerifyConfig

max_drop_option = setting_option(
    "max_drop",
    "--max-drop",
    type=number(DROP),
    help="Percentage points of top-1 that an artifact may lose.",
)
max_drop_top5_option = click.option(
    "--max-top5-drop",
    "max_drop_top5",
    type=number(DROP),
    help="Percentage points of top-5 that an artifact may lose (default: top-5 is not judged).",
)
baseline_option = click.option(
    "--baseline",
    default="card",
    show_default=True,
    metavar="card|none|TOP1[,TOP5]",
    help="What PyTorch itself has to reach before anything is judged.",
)
report_option = click.option(
    "--report",
    "reports",
    type=click.Path(path_type=Path, dir_okay=False),
    multiple=True,
    help="Write a report: .html, .md or .json; may be given several times.",
)
_OPTIONS = (
    model_option,
    data_option("Labelled images: a folder, zip or tar; see --layout.", "validation"),
    max_drop_option,
    max_drop_top5_option,
    click.option(
        "--limit", type=number(IMAGES), help="Only so many images, spread over the classes."
    ),
    click.option("--sequential", is_flag=True, help="Stop as soon as every verdict is known."),
    click.option(
        "--graphs-only", is_flag=True, help="Judge the ONNX graphs and leave the engines out."
    ),
    baseline_option,
    click.option(
        "--allow-leak", is_flag=True, help="Count calibration images among --data, do not refuse."
    ),
    labelling_options(),
    click.option(
        "--batch",
        type=number(BATCH),
        default=16,
        show_default=True,
        help="Images that run at once.",
    ),
    click.option("--workers", type=number(WORKERS), help="Decoding processes; one a core."),
    setting_option(
        "keep_crops",
        "--cache/--no-cache",
        help="Keep decoded crops and PyTorch's logits for the next time.",
    ),
    setting_option(
        "crops_size",
        "--cache-size",
        type=number(CACHE_GB),
        metavar="GB",
        help="Maximum size of the crop cache in GB; 0 keeps nothing (default 34).",
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

    # The group hands on to `run` what is no command of its own, and so all that is incomplete.
    if incomplete and not ctx.params.get("artifacts") and "merge".startswith(incomplete):
        return [CompletionItem("merge")]
    return param.type.shell_complete(ctx, param, incomplete)


@group(cls=DefaultGroup, default="run")
def verify() -> None:
    """Judge artifacts against PyTorch; `verify merge` joins shards."""


@verify.command(
    epilog="\b\n"
    "clipdeploy verify --data IMAGENET_VAL --report verdict.html\n"
    "clipdeploy verify model.int8.onnx --data IMAGENET_VAL --sequential",
)
@click.argument("artifacts", nargs=-1, type=ArtifactPath(), shell_complete=_artifact_or_merge)
@_options
@stage_command
def run(
    context: Context, artifacts: tuple[Path, ...], model: str | None, data: Path, **options: Any
) -> int:
    """Judge the ARTIFACTS, or every graph and engine of the model, against PyTorch.

    Exit code 3 unless all of them are proven to keep their accuracy. A run that was killed goes on
    where it stopped when the same command is given again. `clipdeploy verify merge` joins shards.
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
        data,
        config,
        verify_scope(artifacts, options),
        cluster=cluster_or_none(options["ray"]),
        force=options["force"],
        note=context.note,
        progress=context.progress,
    )
    return _tell(context, result, reports, data)


@verify.command()
@click.argument("shards", nargs=-1, type=click.Path(path_type=Path))
@model_option
@max_drop_option
@max_drop_top5_option
@baseline_option
@report_option
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="The images, if not where the first shard found them; they are compared with the records.",
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
    data: Path | None,
    **options: Any,
) -> int:
    """Join the shards of `verify --shard` to the verdict of one run.

    Takes the given files, or all shards of the workspace, and removes them once they are joined.
    Artifacts and images have to be the files that the shards judged.
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
        data=data,
        note=context.note,
        progress=context.progress,
    )
    return _tell(context, result, reports, data)


def _check_used(artifacts: tuple[Path, ...], options: dict[str, Any]) -> None:
    """Refuse options that this run would not use.

    Raises:
        UsageError: the first of them.
    """
    if any(path.suffix == ".engine" for path in artifacts):
        hint = "leave it out, or name the graphs alone"
        refuse_together("artifacts", "graphs_only", hint=hint)
    if not options["cache"]:
        refuse_unused(["cache_size"], "--cache", "pass --cache")
    if options["graphs_only"] or (artifacts and all(path.suffix == ".onnx" for path in artifacts)):
        refuse_unused(["trust"], "engines", "name an .engine file")
    check_labelling(options)


def _check_reports(reports: tuple[Path, ...], shard: tuple[int, int] | None) -> None:
    if reports and shard:
        raise UsageError("a shard has no verdict to report", hint="pass --report to `verify merge`")
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
        cache=cache if options["cache"] else None,
        shard=shard_or_none(options["shard"]),
        sequential=options["sequential"],
        trust=options["trust"],
        threads=options["threads"],
    )


def verify_scope(artifacts: tuple[Path, ...], options: dict[str, Any]) -> VerifyScope:
    """The options that say what is judged on which images, as a configuration."""
    from clipdeploy.stages.verify.setup import VerifyScope
    from clipdeploy.verification.baseline import Expected

    return VerifyScope(
        artifacts=artifacts,
        graphs_only=options["graphs_only"],
        limit=options["limit"],
        labelling=labelling(options),
        allow_leak=options["allow_leak"],
        expected=Expected.parse(options["baseline"]),
    )


def _tell(context: Context, result: Judgement, reports: tuple[Path, ...], data: Path | None) -> int:
    verification = result.verification
    if verification is None:
        emit(context, {"results": str(result.results)}, lambda: f"{result.results}")
        return 0
    for skipped in verification.skipped:
        context.note(f"skipped, unreadable: {skipped}")
    if reports:
        # Before the result is printed: its reader may be gone by then.
        from clipdeploy.stages.report import write_reports

        found = context.workspace.bisection(verification.model)
        write_reports(result, reports, data=data, bisection=found)
    emit(context, verification, lambda: verification)
    if result.disagreements is not None and any(row.disagreements for row in verification.rows):
        context.note(f"images with another answer than PyTorch's: {result.disagreements}")
    for path in reports:
        context.note(f"report: {path}")
    if any(row.kind == "engine" and row.verdict == "not executed" for row in verification.rows):
        context.note("engines were not executed here; --graphs-only judges the graphs alone")
    return 0 if verification else EXIT_VERIFICATION
