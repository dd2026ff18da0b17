"""Every file here is a variant, and its name is the variant's id."""

from ...cache_schema.users_own_files import and_own

__path__ = and_own(__path__, "train/variants")
