"""Every file here is a variant, and its name is the variant's id."""

from ...cache_schema.users_own_files import with_users_files

__path__ = with_users_files(__path__, "train/variants")
