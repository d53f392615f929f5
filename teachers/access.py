from teachers.online import AccessConfig
from teachers.rows import ACCESS_KINDS
