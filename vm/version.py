"""The version of Manifold; on the ground floor so that every floor can say it."""

VERSION = "0.1.0"
