"""Whom the student learns from: what a teacher reveals, live or recorded, as sparse targets."""
