"""Reports: numbers, tables, plots and pages."""
