"""`mmtok models`: the catalogue of known models."""

from mmtok_cli.cli.options import JsonOption


def models(as_json: JsonOption = False) -> None:
    """List the models that are known by name. Hub ids and directories of their families work as well."""
    from mmtok_cli.profiles import known_profiles
    from mmtok_cli.report.catalogues import models_table
    from mmtok_cli.report.console import print_json, results_console

    profiles = list(known_profiles().values())
    if as_json:
        print_json({"schema": "mmtok.models/1", "models": [profile.model_dump() for profile in profiles]})
    else:
        results_console().print(models_table(profiles))
