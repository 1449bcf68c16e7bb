"""The engine that runs a sweep: the base run, the sites, their packing, the compiled blocks and the report."""
