"""Operation of a deployment: logs, metrics, health, expiry of certificates, rotation of keys, backup and restore."""
