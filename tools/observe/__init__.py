"""What people load into Prometheus and Grafana to watch a cluster: see docs/observability.md."""
