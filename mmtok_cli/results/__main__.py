"""Prints the JSON Schemas of the results: `python -m mmtok_cli.results`."""

import json
import sys

from mmtok_cli.kept import KeptFile
from mmtok_cli.results.engine import EngineComparison, EngineProfile
from mmtok_cli.results.profile import ProfileResult
from mmtok_cli.results.retention import Retention
from mmtok_cli.results.schema import Comparison, SamplePrediction

KINDS = (Comparison, ProfileResult, Retention, SamplePrediction, EngineProfile, EngineComparison, KeptFile)

sys.stdout.write(json.dumps([kind.model_json_schema() for kind in KINDS], indent=2) + "\n")
