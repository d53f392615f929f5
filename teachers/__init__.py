"""Whom the student learns from: what a teacher reveals, beside the student or recorded, as sparse targets."""
