"""`mmtok models`: the catalogue of known models."""

from mmtok_cli.cli.options import JsonOption


def models(as_json: JsonOption = False) -> None:
    """List the known models. Hub ids and local directories of the same families also work."""
    from mmtok_cli.profiles import known_profiles
    from mmtok_cli.report.catalogues import models_legend, models_table
    from mmtok_cli.report.console import print_json, results_console

    profiles = list(known_profiles().values())
    here = [profile.is_here() for profile in profiles]
    if as_json:
        listed = [profile.model_dump() | {"here": is_here} for profile, is_here in zip(profiles, here, strict=True)]
        print_json({"schema": "mmtok.models/1", "models": listed})
    else:
        results_console().print(models_table(profiles, here))
        results_console().print(models_legend(profiles), style="dim")
