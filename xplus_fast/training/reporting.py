"""What is said of a run as it begins, and where its figures may go beside its own folder."""

from collections.abc import Sequence
from typing import Any

from xplus_fast.errors import UserError
from xplus_fast.model.families import shape_of
from xplus_fast.model.prepare import is_prepared, layer_ids, trained_beside
from xplus_fast.planning.flops import total_parameters, trained_parameters
from xplus_fast.planning.selection import describe_layers


def check_report_to(names: Sequence[str]) -> None:
    """See that what `training.report_to` names is known and installed. Raises `UserError`."""
    if not names or list(names) in (["all"], ["none"]):
        return
    from transformers.integrations import integration_utils

    known = sorted(integration_utils.INTEGRATION_TO_CALLBACK)
    here = integration_utils.get_available_reporting_integrations()
    for name in names:
        if name not in known:
            raise UserError(
                f"training.report_to: {name!r:.60} is unknown; known: {', '.join(known)};"
                " all or none alone"
            )
        if name not in here:
            raise UserError(f"training.report_to: {name} is not installed")


def describe_selection(model: Any) -> str:
    """One line: which layers train, and how many parameters of how many."""
    assert is_prepared(model)
    shape = shape_of(model.config)
    ids = layer_ids(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = total_parameters(shape)  # of which quantized ones are not parameters any more
    beside = trained_beside(model)
    whole = trained == trained_parameters(shape, ids, beside)
    return (
        f"training layers {describe_layers(ids) or 'none'} of 0-{shape.layers - 1}"
        + ("" if whole else " (some of their weights)")
        + "".join(f", {kind}" for kind in beside)
        + (" (tied to the head)" if shape.tied and "embedding" in beside else "")
        + f": {trained:,} of {total:,} parameters ({trained / total:.1%})"
    )
