"""The operating system's console: every verb at a prompt, and live panes (docs/console.md)."""
