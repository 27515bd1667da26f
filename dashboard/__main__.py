"""`python -m dashboard`."""

from dashboard.cli import cache_dashboard

cache_dashboard()
