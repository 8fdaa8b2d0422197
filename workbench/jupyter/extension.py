"""The server extension: REST for images and containers. Enabled by installation; no kernel needs it.

Nothing heavy is imported here: the server complains about an extension that takes 0.1 s.
"""

from __future__ import annotations

from typing import Any


def load(serverapp: Any) -> None:
    """Add the routes to a Jupyter server (``_load_jupyter_server_extension``)."""
    from jupyter_server.utils import url_path_join

    from workbench.jupyter import builds, events, handlers, kernelspecs, saving, shared

    web = serverapp.web_app
    events.register(serverapp.event_logger)
    web.settings["workbench_tell"] = tell = events.teller(serverapp)
    web.settings["workbench_builds"] = builds.Builds(tell)
    api = url_path_join(web.settings["base_url"], "workbench", "api")
    routes = [*handlers.ROUTES, (r"(?:/.*)?", handlers.NoRoute)]
    web.add_handlers(".*$", [(api + route, handler) for route, handler in routes])
    if image := shared.workbench(serverapp.config).default_image:
        serverapp.kernel_manager.default_kernel_name = kernelspecs.kernel_name(image)
    saving.register(serverapp)
    serverapp.log.info("Workbench: images and containers at %s", api)
