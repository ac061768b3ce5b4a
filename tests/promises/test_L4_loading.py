"""L4: lazy loading after the end: the error names the attribute, and what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.exceptions import ResponseValidationError
from fastapi.testclient import TestClient
from pydantic import BaseModel, ConfigDict
from sqlalchemy import ForeignKey, select, text
from sqlalchemy.exc import MissingGreenlet, StatementError
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship, sessionmaker
from sqlalchemy.orm.exc import DetachedInstanceError

from rope_middleware import AsyncSessionJenny, RopeMiddleware, SessionJenny, open_scope
from tests.kit.engines import MakeEngine, small_async_engine
from tests.kit.sessions import Jenny


class Base(DeclarativeBase):
    pass


class Author(Base):
    __tablename__ = "author"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    books: Mapped[list[Book]] = relationship()


class Book(Base):
    __tablename__ = "book"
    id: Mapped[int] = mapped_column(primary_key=True)
    author_id: Mapped[int] = mapped_column(ForeignKey("author.id"))


class BookOut(BaseModel):
    model_config = ConfigDict(from_attributes=True)
    id: int


class AuthorOut(BaseModel):
    model_config = ConfigDict(from_attributes=True)
    id: int
    books: list[BookOut]


@pytest.fixture
def jenny(make_engine: MakeEngine) -> Jenny:
    """A jenny for a database with one author, and one book of theirs."""
    engine = make_engine()
    Base.metadata.create_all(engine)
    jenny = SessionJenny(sessionmaker(engine))
    with open_scope(commit_on_success=True):
        jenny.add(Author(name="secret", books=[Book()]))
    return jenny


def author_of(jenny: Jenny, *, commits: bool = False) -> Author:
    """Return an author whose session has ended."""
    with open_scope():
        author = jenny.scalars(select(Author)).one()
        if commits:
            jenny.commit()
    return author


def note_of(error: BaseException) -> str:
    (note,) = [note for note in error.__notes__ if "rope_middleware" in note]
    assert "secret" not in note
    return note


READ: dict[str, tuple[bool, Callable[[Author], object]]] = {
    "Author.books": (False, lambda author: author.books),
    "Author.name": (True, lambda author: author.name),
}


@pytest.mark.parametrize("attribute", READ)
def test_L4_an_attribute_that_is_read_after_the_end_is_named(jenny: Jenny, attribute: str) -> None:
    """A relationship, and a column that a commit has expired; with both cures, and once."""
    commits, read = READ[attribute]
    with pytest.raises(DetachedInstanceError) as caught, open_scope(), open_scope():
        read(author_of(jenny, commits=commits))
    note = note_of(caught.value)
    assert note.startswith(f"{attribute} was not loaded while the session was open")
    assert "selectinload()" in note and "expire_on_commit=False" in note


def test_L4_of_an_error_that_has_another_as_its_cause(jenny: Jenny) -> None:
    """A template engine's, say: both carry the note."""
    with pytest.raises(ValueError, match="template") as caught, open_scope():
        try:
            _ = author_of(jenny).books
        except DetachedInstanceError as error:
            raise ValueError("template") from error
    assert note_of(caught.value).startswith("Author.books")
    assert note_of(caught.value.__cause__ or caught.value).startswith("Author.books")


def test_L4_where_nobody_tells_the_attribute_there_is_none(jenny: Jenny) -> None:
    """The cures stand there all the same; other errors get no note."""
    with pytest.raises(DetachedInstanceError) as caught, open_scope():
        raise DetachedInstanceError("somebody's own")
    assert note_of(caught.value).startswith("An attribute was not loaded")
    with pytest.raises(ZeroDivisionError) as other, open_scope():
        1 / 0  # noqa: B018
    assert not hasattr(other.value, "__notes__")


def test_L4_a_response_model_that_reads_after_the_end(jenny: Jenny) -> None:
    """FastAPI makes an error of its own of it, which keeps only a text."""
    app = FastAPI()
    app.add_middleware(RopeMiddleware)
    app.get("/", response_model=AuthorOut)(lambda: author_of(jenny))
    app.get("/number", response_model=int)(lambda: "no number")
    with pytest.raises(ResponseValidationError) as caught:
        TestClient(app).get("/")
    assert note_of(caught.value).startswith("Author.books was not loaded while the session")
    with pytest.raises(ResponseValidationError) as other:
        TestClient(app).get("/number")
    assert not hasattr(other.value, "__notes__")


# SQLAlchemy leaves the coroutine behind that it could not await.
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_L4_an_async_session_cannot_load_while_an_attribute_is_read(
    jenny: Jenny, tmp_path: Path
) -> None:
    """The twin: in the scope, after a commit, in a response model; and without any attribute."""
    author_of(jenny)
    engine = small_async_engine(next(tmp_path.glob("*.sqlite")))
    twin = AsyncSessionJenny(async_sessionmaker(engine))
    app = FastAPI()
    app.add_middleware(RopeMiddleware)

    async def author() -> Author:
        return (await twin.scalars(select(Author))).one()

    @app.get("/lazy")
    async def lazy() -> int:
        return len((await author()).books)

    @app.get("/expired")
    async def expired() -> str:
        found = await author()
        await twin.commit()
        return found.name

    @app.get("/model", response_model=AuthorOut)
    async def model() -> Any:
        return await author()

    @app.get("/none")
    async def none() -> None:
        twin.session.sync_session.execute(text("SELECT 1"))

    beginnings = {
        "/lazy": "Author.books was not loaded, and an AsyncSession cannot",
        "/expired": "Author.name was not loaded",
        "/model": "Author.books was not loaded",
        "/none": "An AsyncSession was used where nothing awaits it",
    }
    with TestClient(app) as client:
        for path, beginning in beginnings.items():
            with pytest.raises(
                (StatementError, MissingGreenlet, ResponseValidationError)
            ) as caught:
                client.get(path)
            note = note_of(caught.value)
            assert note.startswith(beginning)
            assert "selectinload()" in note and "expire_on_commit=False" in note
        assert client.portal is not None
        client.portal.call(engine.dispose)
