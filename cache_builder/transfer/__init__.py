"""A store as files that travel: Parquet shards in a folder or in a bucket, out (store_export) and in (store_import)."""
