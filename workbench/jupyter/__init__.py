"""The edges that speak Jupyter; asyncio lives only here."""
