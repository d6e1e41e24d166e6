"""One file for each scheme of URLs that bigtrain reads; the file is named after the scheme."""
