"""Audits: one run of an experiment with planted clients, and what they show of its promise."""

from fedpriv.audit.run import AUDIT_FILE, PICTURE_FILE, AuditChoice, run_audit

__all__ = ["AUDIT_FILE", "PICTURE_FILE", "AuditChoice", "run_audit"]
