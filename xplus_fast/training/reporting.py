"""Where a run's figures may go beside its own folder."""

from collections.abc import Sequence

from xplus_fast.errors import UserError


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
