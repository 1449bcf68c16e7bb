"""What runs a sweep: the unpatched run, the sites, their packing, the compiled blocks, the account of the cost."""
