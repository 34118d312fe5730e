def write_report(c): return None
def print_table(f): pass
