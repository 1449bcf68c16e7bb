"""Files of dictionaries as they are published: readers, writers and the names of releases."""
