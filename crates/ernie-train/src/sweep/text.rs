//! Whether the text of a finished run is still what it was.
use std::collections::HashMap;
use std::path::Path;

use crate::data::hash_files;
use crate::error::TrainError;
use crate::origin::{Origin, text_hash};
use crate::recipe::{Recipe, Source};

/// The hash of each source's files as they are now, read once for all runs of a sweep.
#[derive(Default)]
pub(super) struct TextNow {
    /// By what finds the files; none where they cannot be read.
    hashes: HashMap<String, Option<String>>,
}

impl TextNow {
    /// Refuses a finished run of the recipe whose files have changed since. Where they are away, or the run's program did not say what they were, there is nothing
    /// to compare.
    pub fn refuse_other(&mut self, recipe: &Recipe, origin: &Origin, data_root: Option<&Path>) -> Result<(), TrainError> {
        if origin.text.is_empty() {
            return Ok(());
        }
        let Ok(root) = recipe.data_root(data_root) else { return Ok(()) };
        for (source, (name, saved)) in recipe.data.source.iter().zip(&origin.text) {
            if let Some(given) = self.of(source, &root).filter(|given| given != saved) {
                let (out, source_name, saved) = (recipe.run.out.clone(), name.clone(), saved.clone());
                return Err(TrainError::OtherText { out, source_name, saved, given });
            }
        }
        Ok(())
    }

    fn of(&mut self, source: &Source, root: &Path) -> Option<String> {
        let found_by = format!("{:?} {:?} {:?} {root:?}", source.paths, source.exclude, source.format);
        self.hashes.entry(found_by).or_insert_with(|| hash_files(source, root).ok().map(|found| text_hash(&found.hash))).clone()
    }
}
