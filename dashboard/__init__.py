"""The page: a third, small tower over shared/. It reads store, manifests and run folders, and is imported by nobody."""
