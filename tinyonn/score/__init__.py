"""Score: all live segments become one record and one affinity per weight; see `tinyonn.score.stage.score_run`."""
