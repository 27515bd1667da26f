"""The small world: captioned pictures, a judge that reads them, and a model that draws them; all real, all offline."""
