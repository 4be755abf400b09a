"""`import manifold.joblib` makes the backend "manifold" known to joblib."""

from __future__ import annotations

from manifold.shells.sdk.joblib_backend import register

register()
