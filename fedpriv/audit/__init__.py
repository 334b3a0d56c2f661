"""Audits: attack one run of an experiment with planted clients, and judge its privacy guarantee."""

from fedpriv.audit.run import AUDIT_FILE, PICTURE_FILE, AuditChoice, run_audit

__all__ = ["AUDIT_FILE", "PICTURE_FILE", "AuditChoice", "run_audit"]
