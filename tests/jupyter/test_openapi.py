"""The REST API against its description, by requests that schemathesis makes up from it: sound ones and broken ones."""

from __future__ import annotations

from pathlib import Path

import hypothesis
import schemathesis
from schemathesis.specs.openapi.checks import missing_required_header, negative_data_rejection, positive_data_acceptance

from tests.jupyter.conftest import Server
from workbench.jupyter import handlers

schema = schemathesis.openapi.from_path(str(Path(handlers.__file__).parent / "openapi.yaml"))


@schema.parametrize()
@hypothesis.settings(max_examples=12, deadline=None, suppress_health_check=list(hypothesis.HealthCheck), database=None)
def test_the_server_does_what_its_description_says(case: schemathesis.Case, shared_server: Server) -> None:
    """No failure of the server, and each answer of a status, a type and a form that the description has."""
    case.call_and_validate(
        base_url=f"http://127.0.0.1:{shared_server.port}/workbench/api",
        headers={"Authorization": f"token {shared_server.token}"},
        timeout=60,
        excluded_checks=[
            missing_required_header,  # it wants 401, and Jupyter's own word for a stranger is 403: see test_rest.py
            # That a file is an archive cannot be said there.
            *([positive_data_acceptance] if case.path == "/import" else []),
            *([negative_data_rejection] if case.method == "GET" else []),  # unknown words of a query are left alone
        ],
    )
